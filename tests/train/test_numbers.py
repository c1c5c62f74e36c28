"""The verifier of numbers: every notation of a number, exactly, and no part of an expression."""

import time

import pytest

from opsd_kernels.train.envs.numbers import last_number
from opsd_kernels.train.envs.verifiers import numeric

RIGHT = [
    # fractions
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"The answer is \frac{1}{2}.", "1/2"),
    (r"$\frac{1}{2}$", "0.5"),
    (r"\boxed{\dfrac{7}{2}}", "3.5"),
    (r"\boxed{\tfrac72}", "3.5"),
    (r"\boxed{\frac{7}2}", "3.5"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{\frac{-1}{2}}", "-0.5"),
    (r"\boxed{-\frac{-1}{2}}", "0.5"),
    (r"\boxed{\frac{\frac{1}{2}}{3}}", "1/6"),
    (r"\boxed{\frac{1}{\frac{1}{2}}}", "2"),
    (r"\boxed{\frac{22}{7}\%}", "22/700"),
    (r"\frac{1}{2} and \frac{3}{4}", "3/4"),
    ("−½", "-0.5"),
    # mixed numbers
    (r"\boxed{3\frac{1}{2}}", "3.5"),
    (r"\boxed{-3\frac{1}{2}}", "-3.5"),
    ("3 1/2", "3.5"),
    ("3½", "3.5"),
    ("in step 3 7/2", "3.5"),
    # thousands
    ("1{,}234", "1234"),
    (r"Answer: 1{,}234{,}567.", "1234567"),
    (r"\boxed{10,\!000}", "10000"),
    (r"\boxed{1\,234}", "1234"),
    (r"\boxed{1 234 567}", "1234567"),
    ("1\u202f234", "1234"),
    (r"\boxed{\$1{,}234.50}", "1234.5"),
    (r"\boxed{5 million}", "5000000"),
    # powers and scientific notation
    (r"\boxed{1.5\times 10^{-3}}", "0.0015"),
    (r"\boxed{1.5 \cdot 10^3}", "1500"),
    ("1.5×10³", "1500"),
    ("1.5E+3", "1500"),
    (r"\boxed{10^{-3}}", "0.001"),
    (r"\boxed{2^{10}}", "1024"),
    # percent, units, degrees, currencies
    (r"\boxed{50\%}", "0.5"),
    ("50 percent", "0.5"),
    (r"\boxed{50\text{ percent}}", "0.5"),
    (r"\boxed{50\text{\%}}", "0.5"),
    (r"\boxed{25^\circ\text{C}}", "25"),
    (r"\boxed{3 \times 10^{8}\ \text{m/s}}", "3e8"),
    (r"\boxed{\approx 3.14}", "3.14"),
    ("x = –5", "-5"),
    ("pages 3–5", "5"),
    (r"\boxed{1\,\tfrac12}", "1.5"),
    (r"\boxed{5\text{ thousand}}", "5000"),
    (r"\boxed{ \displaystyle\frac 1 2 }", "0.5"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{5 \text{ cm}^2}", "5"),
    (r"\boxed{5\,\mathrm{m/s}}", "5"),
    (r"\boxed{5cm}", "5"),
    ("5 cm²", "5"),
    (r"\boxed{5 m}", "5"),
    (r"\boxed{5\;\text{apples}}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{45^{\circ}}", "45"),
    ("it costs $5", "5"),
    # boxes
    (r"first \boxed{3} then \boxed{4}, not 5", "4"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{{{7}}}", "7"),
    (r"\fbox{7}", "7"),
    (r"\boxed 7", "7"),
    (r"\[\boxed{\left(\frac{3}{4}\right)}\]", "0.75"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{2 + 3 = 5}", "5"),
    (r"\boxed{\text{The answer is }5}", "5"),
    (r"\boxed{- 5}", "-5"),
    (r"\boxed{2.}", "2"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{\mathbf{7}}", "7"),
    # text
    (r"\begin{aligned} x &= 5 \end{aligned}", "5"),
    ("**5**", "5"),
    ("#### 42", "42"),
]
WRONG = [
    (r"\boxed{\frac{3}{4}}", "4"),
    (r"\boxed{\frac{3}{4}}", "3"),
    (r"\frac{1}{2}", "2"),
    ("1{,}234", "234"),
    (r"\boxed{1 234}", "235"),
    (r"\boxed{2^3}", "3"),
    (r"\boxed{10^{10^{10}}}", "10"),
    (r"10^{-3}", "3"),
    ("2**3", "3"),
    ("(-2)^2", "2"),
    (r"\boxed{\sqrt{2}}", "2"),
    (r"the side is 4, the diagonal \sqrt{2}", "4"),
    (r"\sqrt2", "2"),
    (r"2\sqrt{3}", "2"),
    (r"\boxed{3\pi}", "3"),
    (r"3\pi", "3"),
    (r"\frac{\pi}{4}", "4"),
    (r"\boxed{\frac{1}{2}\pi}", "0.5"),
    (r"\boxed{3x}", "3"),
    (r"\boxed{\frac{3}{4}x}", "0.75"),
    (r"\boxed{\pm 5}", "5"),
    ("±5", "5"),
    (r"\boxed{5 \text{ or } 6}", "6"),
    (r"\boxed{5, 6}", "6"),
    (r"\boxed{\{1,2\}}", "2"),
    (r"\boxed{2+3}", "5"),
    (r"\boxed{7 - 12}", "12"),
    (r"\boxed{x > 5}", "5"),
    (r"\boxed{101_{2}}", "2"),
    (r"\boxed{\log_2 8}", "8"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{5 million}", "5"),
    (r"\boxed{50\text{ percent}}", "50"),
    (r"\boxed{1+\frac{1}{2}}", "1/2"),
    (r"\boxed{2 \text{ hours } 30 \text{ minutes}}", "30"),
    (r"\boxed{0.\overline{3}}", "3"),
    (r"\boxed{\frac{1}{0}}", "1"),
    (r"it is 5, so \boxed{5", "5"),
    (r"5, so \boxed{}", "5"),
    (r"\boxed{none}, or 5", "5"),
]


@pytest.mark.parametrize("completion, answer", RIGHT)
def test_a_number_is_read_in_every_notation(completion, answer):
    assert numeric(completion, {"answer": answer}).success
    assert not numeric(completion, {"answer": answer + "1"}).success
    # The notation of the data file is read the same way.
    assert numeric(answer, {"answer": completion}).success


@pytest.mark.parametrize("completion, answer", WRONG)
def test_a_part_of_an_expression_is_no_number(completion, answer):
    assert not numeric(completion, {"answer": answer}).success


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" + "{" * 20_000,
        "{" * 3_000 + "1" + "}" * 3_000,
        "\\frac{" * 2_000 + "1" + "}{2}" * 2_000,
        "9" * 100_000,
        "9^999" * 1_000,
        "-" * 50_000,
        "1 " * 30_000,
        "10^" * 30_000,
    ],
    ids=lambda text: text[:8],
)
def test_no_text_takes_long(text):
    began = time.monotonic()
    last_number(text)
    assert time.monotonic() - began < 20  # .3 s, on a busy machine more
