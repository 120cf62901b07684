"""Everything that `baft` raises on purpose.

BaftError
├── InputError            a prompt, target or other text that cannot be used   (also a ValueError)
├── ConfigError           a setting that is wrong or impossible here           (also a ValueError)
│   └── UnknownNameError  a name nobody registered; suggests the nearest one   (also a KeyError)
├── HostError             a host that cannot be had or used
│   ├── DownloadError         its files could not be fetched, or came damaged
│   ├── TermsError            its terms were not accepted
│   └── UnsupportedHostError  its structure is not one that can be edited
├── DataError             a benchmark's file that is missing or cannot be read   (also a ValueError)
├── GenerationError       a way of generating under which an edit cannot be right
├── EditError             an edit that could not be made; the model is as it was before
│   └── ConflictError         it conflicts with one in force
├── UndoError             there is nothing, or no longer anything, to take back
└── ArtifactError         an edit set on disk that cannot be read or written
    ├── DamagedArtifactError  a file is missing, truncated, misshapen or not finite
    ├── SchemaError           written by another version of the format
    └── HostMismatchError     made on other weights than this host's

Each message says what is wrong, what was got, what was expected and how to mend it.
"""


class BaftError(Exception):
    """Root of every error that `baft` raises on purpose."""


class InputError(BaftError, ValueError):
    """A prompt, target or other text that cannot be used."""


class ConfigError(BaftError, ValueError):
    """A setting that is wrong in itself, or impossible on this host."""


class UnknownNameError(ConfigError, KeyError):
    """A name that nobody registered."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class HostError(BaftError):
    """A host that cannot be had or used."""


class DownloadError(HostError):
    """The files of a host could not be fetched, or came damaged."""


class TermsError(HostError):
    """The terms of a host were not accepted."""


class UnsupportedHostError(HostError):
    """The structure of a host is not one that can be edited."""


class DataError(BaftError, ValueError):
    """A benchmark's file that is missing, or holds something that cannot be read."""


class GenerationError(BaftError):
    """A way of generating under which an edit cannot be right."""


class EditError(BaftError):
    """An edit that could not be made; the model is as it was before."""


class ConflictError(EditError):
    """An edit that conflicts with one in force, where that was to be refused."""


class UndoError(BaftError):
    """There is nothing, or no longer anything, to take back."""


class ArtifactError(BaftError):
    """An edit set on disk that cannot be read or written."""


class DamagedArtifactError(ArtifactError):
    """A file of an artifact is missing, truncated, misshapen or not finite."""


class SchemaError(ArtifactError):
    """An artifact written by another version of the format."""


class HostMismatchError(ArtifactError):
    """An artifact made on other weights than those of this host."""
