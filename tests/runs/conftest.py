"""The tiny saved model, for this folder too."""

from __future__ import annotations

from saved_model import model_folder, text_file

__all__ = ["model_folder", "text_file"]  # fixtures
