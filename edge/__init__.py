"""The edge: the client, the trainer, data sets and the command line."""
