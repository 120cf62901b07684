"""What a host is, how text becomes tokens for it, and how an intervention is put into force on it."""
