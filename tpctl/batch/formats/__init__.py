"""What batches read and write: a source finds rows by their place, a sink writes a part; a file for each format."""
