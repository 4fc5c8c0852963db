"""Protecting checkpoints and trees; opening, rotating and inspecting what was protected."""
