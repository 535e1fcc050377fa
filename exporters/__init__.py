"""Exporters to deployment formats."""
