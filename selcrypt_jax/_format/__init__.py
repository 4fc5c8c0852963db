"""The protected file, as described in FORMAT.md: manifest, boxes, envelope, tensors."""
