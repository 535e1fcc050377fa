"""The error tree. Every message says what failed, where (module name, file or tensor), why, and what to do."""


class TQError(Exception):
    """Base of every error that tqcompile raises on purpose."""


class ConfigError(TQError, ValueError):
    """A setting is unknown, malformed, or matches nothing."""


class ModelError(TQError, ValueError):
    """The model cannot be quantized: no linear layers, NaN weights, already quantized."""


class CalibrationError(TQError, ValueError):
    """Calibration data is empty, ambiguous, outside the vocabulary, or yields NaN activations."""


class NumericError(TQError, ArithmeticError):
    """A factorisation or a quantizer met numbers it cannot handle."""


class PassError(TQError, RuntimeError):
    """A graph pass was given a graph it does not accept, or left one it must not leave."""


class CheckpointError(TQError, ValueError):
    """A checkpoint is truncated, altered, or not one of ours."""


class ExportError(TQError, RuntimeError):
    """A model could not be exported, or the exported file does not reproduce the model."""


class DistributedError(TQError, RuntimeError):
    """Another process of a run failed, is gone, or was started with something else."""
