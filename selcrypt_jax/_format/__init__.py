"""The protected file, as FORMAT.md describes it: manifest, boxes, envelope, tensors."""
