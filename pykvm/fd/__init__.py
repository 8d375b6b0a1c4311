"""File descriptors: what is open, and the one way into an ioctl."""
