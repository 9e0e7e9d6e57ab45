"""What property tests make their examples of."""

from __future__ import annotations

import re
import string
from typing import Final

from hypothesis import strategies as st

from flame.protocol.messages import TaskFault
from flame.protocol.resources import Resources

LETTERS: Final = string.ascii_letters + string.digits + "_-"
LEGAL: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)

tokens: Final = st.text(LETTERS, min_size=1, max_size=64)
application_names: Final = st.text(LETTERS, min_size=1, max_size=48)

ILLEGAL: Final = (
    "",
    ".",
    "a.b",
    "*",
    ">",
    "a*",
    "a>",
    " ",
    "a b",
    "a\tb",
    "a\n",
    "\na",
    "a\r\nb",
    "a\0b",
    "a\x7f",
    "é",
    "名前",
    "٣",  # a digit, but not of ASCII
    "\udce9",  # what an undecodable byte of a file name becomes
    "a/b",
    "$JS",
    "a" * 65,
)
"""Names that must be refused wherever one is taken."""

illegal_names: Final = st.one_of(
    st.sampled_from(ILLEGAL), st.text().filter(lambda text: LEGAL.fullmatch(text) is None)
)

plain_text: Final = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
"""Text that has a UTF-8 form."""
times: Final = st.floats(min_value=0, max_value=4e9, allow_nan=False)
counts: Final = st.integers(min_value=0, max_value=2**40)
amounts: Final = st.builds(
    Resources,
    cpu=st.floats(min_value=0, max_value=1e6, allow_nan=False),
    memory=st.integers(min_value=0, max_value=2**52),
    gpu=st.integers(min_value=0, max_value=1000),
)
faults: Final = st.builds(TaskFault, code=plain_text, message=plain_text, type=plain_text, traceback=plain_text)
