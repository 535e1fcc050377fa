"""Graph passes: one file, one class. The pipelines that run them are in tqcompile/api.py and tqcompile/backend.py."""
