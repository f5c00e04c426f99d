"""Texts that attack whoever shows them: markup, templates, formulas, direction, odd characters."""

from __future__ import annotations

import sys

ATTACKS = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg onload='window.pwned = 1'><script href='https://evil.test/s.js'/></svg>",
    "<iframe src='javascript:parent.pwned = 1'></iframe>",
    "<style>@import 'https://evil.test/s.css'; * { display: none }</style>",
    "<meta http-equiv='refresh' content='0; url=https://evil.test/'>",
    "<base href='https://evil.test/'><link rel='stylesheet' href='s.css'>",
    "<form action='https://evil.test/'><input autofocus onfocus='window.pwned = 1'>",
    "<a href='javascript:window.pwned = 1' style='position: fixed; inset: 0'>x</a>",
    "<object data='https://evil.test/'></object><video poster='https://evil.test/p.png'>",
]
WAYS_OUT = [
    "{}",
    "</script>{}",
    "</SCRIPT >{}",
    "<!--<script>{}",
    "-->{}",
    '">{}',
    "'>{}",
    "</title></style></textarea></template>{}",
    "]]>{}",
    "\\u003c/script\\u003e\\{}",
]
OTHERS = [
    "{{ 7 * 7 }}",
    "{% for x in range(9) %}",
    "{{ self.__init__.__globals__ }}",
    "${window.pwned = 1}",
    "&lt;script&gt; &#60;script&#62; &amp;lt;",
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)",
    "+1-1",
    "-2+3",
    "'=1",
    "\t=1",
    "\u202egnitset si siht\u202c",
    "\u2066\u202e left open",
    "\u2028 and \u2029",
    "\ufeff\x0b\x0c\x1b[31m\x7f\x9b31m",
    "__proto__",
    "constructor",
    "e\u0301\u0301\u0301\u0301 \U0001f469\u200d\U0001f4bb \U0010ffff",
    "\r and \r\n",
    "`'\"\\",
]
NUL = ["a NUL \0 inside", "\0"] if sys.version_info >= (3, 11) else []  # csv cannot read it before

TEXTS = [way.replace("{}", attack) for way in WAYS_OUT for attack in ATTACKS] + OTHERS + NUL
LABELS = [
    *ATTACKS,
    *OTHERS[:9],
    *OTHERS[11:17],
    WAYS_OUT[1].replace("{}", ATTACKS[0]),
    "\u2028",
    *NUL[:1],
]
