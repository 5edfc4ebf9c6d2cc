"""One typed function per step; the command line and the flows are thin faces of it."""
