"""What caches keep and how: room to grow, undo, spans, segments and clusters of the body."""
