"""The protected file and key files, as FORMAT.md describes them."""
