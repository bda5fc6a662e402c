"""What a user can cause: shown as one message, without a traceback, with exit code 2."""


class MoetrainError(Exception):
    """The base of every fault a user can cause and mend."""


class ConfigError(MoetrainError):
    """A setting is unknown, of the wrong type, or breaks a rule.

    Args:
        problems: every broken rule, each a sentence that names the field, its value, the rule and a way out.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("config is not usable:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


class DataError(MoetrainError):
    """Text or token files that are missing, empty, unreadable or do not fit the model."""


class CheckpointError(MoetrainError):
    """A checkpoint that cannot be written, is not whole, or does not fit the run."""


class FormatError(CheckpointError):
    """A checkpoint that another version of moetrain wrote: it is no damage, and nothing older may take its place."""


class LaunchError(MoetrainError):
    """The processes of a run could not be started, or one of them died."""


class NoGoError(LaunchError):
    """Preflight found that the nodes are not fit for the run: another start on them would end in the same way."""


class LostError(LaunchError):
    """A rank was killed, its node or the way to it was lost: nothing that the run itself does wrong every time."""


class HangError(LostError):
    """No rank made progress any more, and the ranks stopped themselves."""


class TrainingError(MoetrainError):
    """The run itself went wrong: a loss or gradient that is no longer a finite number."""
