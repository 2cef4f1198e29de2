"""Starting, watching and stopping torchrun workers, and the socket between them and the command line. No torch."""
