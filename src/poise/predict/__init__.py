"""What will be needed next, from what was: pure policies over arrays. No torch, no clock, no I/O but their own files."""
