"""Files: atomic outputs, strict JSON, safetensors, shards, Orbax; the errors of the package."""
