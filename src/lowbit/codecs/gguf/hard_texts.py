"""Texts on which tokenizers differ: a converted vocabulary must give the original's token ids on every one of them.

Escapes stand for what cannot be seen in an editor: joiners, combining marks, direction marks, control characters.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["HARD_TEXTS", "with_special_tokens"]

HARD_TEXTS: tuple[str, ...] = (
    # White space
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  spaces   three    four ",
    "\n",
    "\n\n\n",
    "a\nb\n\nc\n\n\nd \n e  \n\n  f",
    "\r\nwindows\r\n\r\nlines\r\rmac\r",
    "\ttab\t\ttabs\t\t\t three \t mixed \n\t indented\n\t\t twice\n    four\n        eight",
    "trailing spaces   \n   leading and trailing   ",
    "no-break\u00a0space thin\u2009space ideographic\u3000space line\u2028separator next\u0085line form\x0cfeed",
    " \n \n\n \t \t\t\n x \n",
    # Contractions and apostrophes
    "I'm you're he's she'll we've they'd can't 'twas 'S 'T 'RE 'VE 'M 'LL 'D I'M YOU'RE HE'S SHE'LL WE'VE",
    "'s't're've'm'll'd 'x 'lll 'rest ''s '''re don''t rock'n'roll",
    "l'été d'abord qu'il aujourd'hui l’homme c’est jusqu’à",
    "Ankara'da İstanbul'un O'Neill's dell'amico um's geht's",
    "It’s “curly” ‘quotes’ «guillemets» „unten“ ‚einzeln‘",
    # Digits
    "1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890",
    "3.14159 1,234,567.89 1e-10 0x1F600 0b1010 1_000_000 12:34:56 2026-11-21 +49 (30) 1234-5678",
    "a1b2c3 x86_64 4th 2nd abc123def 123abc456",
    "spaced   12  345\n  6789   x\t\t42 \n\n 7",
    "½ ¾ ² ³ ① Ⅷ ٣٤٥ १२३४ ๑๒๓ 𝟘𝟙𝟚𝟛 一二三 〇",
    # Letters of other scripts, case, marks
    "Ünïcödé naïve façade Ærøskøbing Straße ŁÓDŹ Žižek ﬁne ﬂow ǅ ǆ Ǆ",
    "camelCase PascalCase SCREAMING_CASE snake_case kebab-case iPhone HTTPServer XMLHttpRequest aB Ab AB ab",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 Z\u0351\u036b\u0343algo\u0334\u0348 q\u0307\u0323",
    "Привет, мир! Ёжик в тумане. Українська мова. Ћирилица",
    "Ελληνικά: ὁ βίος βραχύς, ἡ δὲ τέχνη μακρή",
    "你好，世界！我们在2026年测试分词器。繁體中文。",
    "日本語のテキスト、カタカナとひらがな。ﾊﾝｶｸ ＦＵＬＬＷＩＤＴＨ １２３",
    "한국어 텍스트 토큰화 시험입니다. ㄱㄴㄷ",
    "नमस्ते दुनिया क्षत्रिय বাংলা ভাষা தமிழ் తెలుగు മലയാളം",
    "ภาษาไทยไม่มีช่องว่าง ລາວ ខ្មែរ မြန်မာ བོད་ཡིག",
    "مرحبا بالعالم، كيف الحال؟ فارسی می\u200cخواهم אבגדה שָׁלוֹם",
    "\u202bright to left\u202c \u200fmark\u200e \u2067isolate\u2069 \ufeffbom soft\u00adhyphen word\u2060joiner",
    "ქართული Հայերեն ᏣᎳᎩ አማርኛ ᚠᚢᚦ 𐍈𐌰 𒀀𒀁 𠀀𠀁",
    # Emoji
    "😀😃😄 😶\u200d🌫\ufe0f 👨\u200d👩\u200d👧\u200d👦 👩🏽\u200d💻 🏳\ufe0f\u200d🌈 🇩🇪🇯🇵 1\ufe0f\u20e3 ❤\ufe0f ✅ 🦙🦙",
    "text😀text 😀text text😀 !😀! 7😀7",
    # Symbols and punctuation
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "... ?! !!! ??? --- === *** ### $$$ %%% &&& ||| ~~~ ``` ^^^ ___ /// \\\\\\ ,,, ;;; :::",
    "€ £ ¥ ₿ © ® ™ § ¶ † ‡ • … ‰ ← → ↔ ⇒ ∀ ∃ ∑ ∫ √ ∞ ≠ ≤ ≥ ⊕ ■ ▲ ● ░ █ ╔═╗ ∂²u/∂x²",
    "。、！？；：「」『』（）【】《》〈〉—…～·",
    "a.b,c;d:e!f?g (h)[i]{j}<k>/l\\m|n a.\nb,\nc;\n\nd !\n\n(\n",
    "http://example.org/path?query=1&b=%20#frag user.name+tag@mail.example.com C:\\dir\\file.txt ~/x/../y",
    # Code
    "def f(x: int = 3, *args, **kw) -> dict[str, int]:\n    return {'a': x ** 2, \"b\": x // 2}  # comment\n",
    '#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; ++i) {\n\t\tprintf("%d\\n", i);\n\t}\n}\n',
    "SELECT * FROM t WHERE a <> 'b''c' AND d >= 10; -- n\n<div class=\"x\">&nbsp;</div>\n$HOME && ls -la | grep '^d'",
    '\\begin{equation} \\frac{a_1}{b^{2}} = \\sqrt{\\alpha} \\end{equation} {"key": [1, 2.5, null, true]}',
    "x=1;y=2;z=x+y;if(x==y){z-=1;}else{z*=2;}a&&b||!c;p->q;r::s;t=>u;v?.w",
    # Control characters, invalid input replaced, private and unassigned code points
    "nul\x00bell\x07backspace\x08escape\x1b[31mred\x1b[0m delete\x7f unit\x1fseparator",
    "bad \ufffd bytes \ufffd\ufffd here\ufffd",
    b"caf\xe9 \xff\xfe truncated \xe4\xbd".decode("utf-8", errors="replace"),
    "private \ue000\uf8ff plane \U000f0000 last \U0010fffd",
    # Long runs
    "a" * 300,
    "Ab" * 120,
    "é" * 200,
    "中" * 150,
    "7" * 100,
    " " * 130 + "x",
    "\n" * 60 + "y",
    "-" * 150 + ">" + "=" * 90,
    "ha" * 60 + " " + "ho " * 60,
    # What a tokenizer may take for its own signs
    "▁already ▁▁marked Ġbyte Ċlevel Âą <0x0A> <unk> <s> ##piece </w> @@ [UNK] [PAD0]",
    # Prose
    "The quick brown fox jumps over the lazy dog. Once upon a time, there was a little girl named Lily.",
    "Mr. Smith's e-mail (sent 3/4/2021 at 5pm) said: \"We'll pay $1,000.50—no more!\" Wouldn't you?",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Portez ce vieux whisky au juge blond qui fume.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. Příliš žluťoučký kůň úpěl ďábelské ódy. Árvíztűrő tükörfúrógép.",
)
"""Small enough to be encoded in a moment, hard enough that pre-tokenizers which differ are told apart."""


def with_special_tokens(tokens: Sequence[str]) -> list[str]:
    """Texts with each of ``tokens`` at the start, in the middle (with and without spaces), twice, and at the end."""
    texts = []
    for token in tokens:
        texts += [
            token,
            f"{token}Hello there",
            f"Hello{token}there",
            f"Hello {token} there,\n{token}\nthen",
            f"{token}{token} twice{token}",
            f"<{token}> {token[:-1]} {token.upper()} {token.lower()}",
        ]
    return texts
