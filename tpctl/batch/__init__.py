"""A batch over several engines: a folder is the truth, every change of state is one rename, anyone may be killed."""
