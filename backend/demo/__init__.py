"""The miniature world: rendered people, photo sets and small weights in the real formats (DESIGN section 6)."""
