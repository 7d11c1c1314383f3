"""The one exception that means: the input is wrong, and here is what to do about it."""


class UserError(Exception):
    """A mistake in params, data or set-up that the reader of the message can mend.

    The message names the file or the key, says what was expected and what to do. `pipeline.stage.main` prints it without a
    traceback; every other exception is a defect of winnow and keeps its traceback.
    """


class Unavailable(UserError):
    """A network or a server did not give what is needed: nothing is wrong with the input, and a repetition may help.

    The exit status of a stage says so (75), and Prefect tries it again.
    """
