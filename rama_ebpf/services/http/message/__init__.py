"""HTTP messages, whatever version carries them: what they hold, what must not be in them, how large they may be."""
