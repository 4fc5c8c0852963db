# Shortcuts; the README has the same commands in full.

python = .venv/bin/python

.PHONY: demo test slow lint docs

.venv/installed: pyproject.toml
	python3 -m venv .venv
	$(python) -m pip install -q -e '.[dev]'
	touch $@

demo: .venv/installed
	$(python) -m selcrypt_jax demo --out out

test: .venv/installed
	$(python) -m pytest -n 2 -m 'not slow'

slow: .venv/installed
	$(python) -m pytest -n 2 --dist worksteal -m slow

lint: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --pythonpath $(python)

docs: .venv/installed
	.venv/bin/mkdocs build --strict
