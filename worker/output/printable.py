"""Escape control characters: those of a record would act on the terminal of the person who reads it."""


def printable(text: str, keep: str = "") -> str:
    """Return the text with every character escaped that is neither printable nor in `keep`."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)
