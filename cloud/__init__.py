"""The cloud: the server, its sessions and its command line."""
