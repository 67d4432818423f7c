"""Quoted text of prompts: what is quoted, and what only looks like it."""

from __future__ import annotations

import time

import pytest
from star_trainer.prompts.quotes import quoted_texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        # Inches and feet.
        ('a 12" ruler next to a sign that says "STOP"', ["STOP"]),
        ('a 6\'2" player in a shirt that reads "TIGERS"', ["TIGERS"]),
        ('two 12" x 9" frames and "A" beside a 3½" disk', ["A"]),
        ("a 12” pizza in a box with “HOT”", ["HOT"]),
        ('a door with "Room 12" and the "B"', ["Room 12", "B"]),
        ('a cover that says "7" Vinyl Sale"', ['7" Vinyl Sale']),
        ("a 6' fence and a 5'10'' man with 'KEEP OUT'", ["KEEP OUT"]),
        ('a 12"x9" frame with "A" in it', ["A"]),
        ("a sign 'Dogs' at a height of 6'", ["Dogs"]),
        # Decades and apostrophes.
        ("an '80s diner with a neon sign that says 'OPEN'", ["OPEN"]),
        ("a ’57 Chevy, Tom’s, with the plate ‘FAST 1’", ["FAST 1"]),
        ("a '57 Chevy in the girls' lot", []),
        ("a poster that says '90s Party'", ["90s Party"]),
        ("a rock 'n' roll band under a banner that reads \"LIVE\"", ["LIVE"]),
        ("a poster that says 'Rock ’n’ Roll'", ["Rock ’n’ Roll"]),
        ("a block with the letter 'n' on it", ["n"]),
        ("a banner: 'Dogs' Day Out'", ["Dogs' Day Out"]),
        ("a sign 'Goin' Home' beside 'Dogs' and 'Cats'", ["Goin' Home", "Dogs", "Cats"]),
        ("a 'Sales' booth at the farmers' market", ["Sales"]),
        ("the trophy doesn't fit into Tom's and the girls' room", []),
        # Other languages.
        ("a sign with »HELLO« and «BYE» and » HEJ »", ["HELLO", "BYE", "HEJ"]),
        ("ein Schild mit „Offen“ und ein Plakat mit “Zu” und ‚Nein‘", ["Offen", "Zu", "Nein"]),
        ("en skylt med ”Hej” och ’Hej då’, szyld „Otwarte”", ["Hej", "Hej då", "Otwarte"]),
        ("標識「止まれ」と『上』のある道", ["止まれ", "上"]),
        ("写着\"你好\"的牌子和“再见”的牌子和'好'", ["你好", "再见", "好"]),
        # Marks that do not match, stand inside others, or have none to match.
        ('a slushy cup with “SDXL" on it and „Offen" and “FLUX”', ["SDXL", "Offen", "FLUX"]),
        ('a banner with “say "cheese" now” on it', ['say "cheese" now']),
        ('a sign that says "OPEN next to "SALE"', ["SALE"]),
        ('a sign that says "OPEN', []),
        ("a 'sign\non the cats'", []),
        ("a wall with ``HELLO'' and ''BYE''", ["HELLO", "BYE"]),
        ('a sign says"STOP", " GO " and "!!!"', ["STOP", "GO"]),
    ],
)
def test_what_a_prompt_quotes(prompt: str, texts: list[str]) -> None:
    assert [prompt[begin:end] for begin, end in quoted_texts(prompt)] == texts


@pytest.mark.parametrize("piece", ['"', "'", "'a ", "“‘«", "'as' b", '"1" ', '“a" ', "'s' s"])
def test_many_marks_take_no_longer_than_their_number(piece: str) -> None:
    start = time.perf_counter()
    quoted_texts(piece * 5000)
    assert time.perf_counter() - start < 2.0
