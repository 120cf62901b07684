"""Where the words of a user stand in a row of tokens, be it a raw prompt or a rendered chat."""

from baft.errors import InputError
from baft.hosts.encoding import Encoder

Row = tuple[int, ...]
_WORDS = tuple(f"\x00turn{i}\x00" for i in range(3))  # stand for what is said, where a template is read


class Turns:
    """What a host's chat template puts around the words of a conversation.

    Args:
        encoder: The host's.
    """

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._special = frozenset(encoder.tokenizer.all_special_ids)
        self.headers: tuple[Row, ...] = ()  # before a user's words; the first that is found counts
        self.tail: Row = ()  # after the last ones, up to the reply
        # From a user's words to the reply, and from there to the next ones.
        self.seams: tuple[str, str] | None = None
        if encoder.has_chat:
            self._read_template()

    def words(self, row: Row) -> tuple[int, int]:
        """Where the words of the last user turn, or of a raw prompt, begin and end.

        A row is taken for a chat if it holds what the template puts before a user's words.
        """
        for header in self.headers:
            start = _last(row, header)
            if start is not None:
                start += len(header)
                end = _first(row, self.tail, start)
                return start, len(row) if end is None else end
        start = 0
        while start < len(row) - 1 and row[start] in self._special:
            start += 1
        return start, len(row)

    def is_chat(self, row: Row) -> bool:
        """Whether a row is a rendered chat."""
        return any(_last(row, header) is not None for header in self.headers)

    def _read_template(self) -> None:
        first, reply, second = _WORDS
        said = [("user", first), ("assistant", reply), ("user", second)]
        messages = [{"role": role, "content": words} for role, words in said]
        try:
            text = self._encoder.render(messages)
        except InputError:  # a template that takes one turn alone
            text = self._encoder.render(messages[:1])
        before, _, rest = text.partition(first)
        to_reply, _, rest = rest.partition(reply)
        to_user, _, rest = rest.partition(second)
        # A system prompt may stand before the first turn: what stands before every turn is common to both.
        texts = [before, to_user] if to_user else [before]
        found: list[Row] = []
        for one in (texts, [text.rstrip() for text in texts]):  # a space may have become part of the words
            rows = [self._encoder.inner(text) for text in one]
            found.append(_common_end(rows[0], rows[-1]))
        self.headers = tuple(header for header in dict.fromkeys(found) if header)
        self.seams = (to_reply, to_user) if to_user else None
        self.tail = self._encoder.inner(rest if to_user else to_reply)


def _common_end(one: Row, other: Row) -> Row:
    n = 0
    while n < min(len(one), len(other)) and one[-1 - n] == other[-1 - n]:
        n += 1
    return one[len(one) - n :]


def _last(row: Row, part: Row) -> int | None:
    starts = range(len(row) - len(part), -1, -1)
    return next((i for i in starts if row[i : i + len(part)] == part), None)


def _first(row: Row, part: Row, start: int) -> int | None:
    if not part:
        return None
    return next((i for i in range(start, len(row) - len(part) + 1) if row[i : i + len(part)] == part), None)
