"""One file a command: its flags, and the few lines that put the library to work."""
