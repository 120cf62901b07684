"""Which edit a prompt is about: the text that this is learned from, the head that learns it, and its use."""
