"""Files: atomic outputs, strict JSON, safetensors, shards, Orbax."""
