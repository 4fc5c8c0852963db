"""From scores to nested masks."""
