"""Starting, watching and stopping workers, and the socket between them and the command line. No torch."""
