"""TextUnits: which tokens of which tokenizer a unit's text falls on."""

from __future__ import annotations

import json
import re
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_kernels.text_units import TextUnits, chat_template
from tests import tiny_models

CLIP = tiny_models.tiny_clip_tokenizer()
T5 = tiny_models.tiny_t5_tokenizer()
BOTH = (CLIP, CLIP, T5)

needs_data = pytest.mark.skipif(not tiny_models.CLIP_MERGES.exists(), reason="the public data folder is not there")


@pytest.fixture(scope="module")
def real_clip():
    return tiny_models.real_clip_tokenizer()


def marked_text(tokenizer, prompt, weights, length):
    """The prompt's characters under the tokens with weight, runs joined by "|", and the weights seen on them."""
    encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True)
    assert len(weights) == len(encoded.input_ids)
    characters = set()
    for (begin, end), weight in zip(encoded.offset_mapping, weights.tolist(), strict=True):
        if weight:
            assert begin < end, "a token without characters has weight"
            characters |= set(range(begin, end))
    runs, last = [], None
    for i in sorted(characters):
        if last is None or prompt[last + 1 : i].strip():
            runs.append("")
        elif i > last + 1:
            runs[-1] += " "
        runs[-1] += prompt[i]
        last = i
    return "|".join(run.strip() for run in runs)


def find(prompt, unit, tokenizer=CLIP, length=77):
    units = TextUnits.from_prompts([prompt], [[unit]], tokenizers=tokenizer, max_lengths=[length])
    return marked_text(tokenizer, prompt, units.weights[0, :, 0], length)


@pytest.mark.parametrize("tokenizer", [CLIP, T5], ids=["clip", "t5"])
@pytest.mark.parametrize(
    ("prompt", "unit", "marked"),
    [
        ("a photo of a red circle", "red circle", "red circle"),
        ("A Photo of a RED Circle", "red circle", "RED Circle"),
        ("a photo of a red circle", "RED CIRCLE", "red circle"),
        ("  a red \t\n circle ", " red  circle", "red circle"),
        ("a cat, a dog and a cat.", "cat", "cat|cat"),
        ("a category of cats concatenated", "cat", ""),
        ("the cat's whiskers", "cat", "cat"),
        ("cats", "cats", "cats"),
        ("13 cats and 3 dogs", "3 dogs", "3 dogs"),
        ("room 13, 3 cats", "3", "3"),
        ('a sign that says "Hello World"', "Hello World", "Hello World"),
        ('a sign that says "Hello World"', '"Hello World"', '"Hello World"'),
        # Both tokenizers give a composed letter the characters of its base letter alone.
        ("a photo of a cafe\u0301 in snow", "café", "cafe"),
        ("a photo of a café in snow", "cafe\u0301", "café"),
        ("the ＲＥＤ circle", "red", "ＲＥＤ"),
        ("a red\u200b circle", "red circle", "red\u200b circle"),
        ("a red\u00a0circle", "red circle", "red circle"),
        ("the word ŞEKER on a sign", "şeker", "ŞEKER"),
        ("a 🐱 on a car", "🐱", "🐱"),
        ("İstanbul in snow", "İstanbul", "İstanbul"),
        ("a stop-sign", "stop", "stop"),
        ("(a dog)", "a dog", "a dog"),
        ("dog", "dog", "dog"),
    ],
)
def test_a_unit_marks_the_tokens_of_its_text(tokenizer, prompt, unit, marked):
    assert find(prompt, unit, tokenizer).replace("\u200b", "") == marked.replace("\u200b", "")


def test_a_word_of_a_script_without_spaces_is_found_between_others():
    assert find("a 黑猫 in snow", "猫") == "猫"
    # T5 joins unknown characters in one token, which belongs to each unit that it touches.
    assert find("a 黑猫 in snow", "猫", T5) == "黑猫"


def test_a_token_that_straddles_a_unit_belongs_to_it():
    # CLIP's pre-tokenizer keeps punctuation together: !" is one token.
    assert find('it says "Hello!"', "Hello!") == 'Hello!"'
    assert find('it says "Hello!"', "Hello") == "Hello"


def test_a_marked_letter_is_not_its_base_letter_and_words_go_on_through_marks():
    assert find("a cafe\u0301 and a cafe", "cafe") == "cafe"
    assert find("कि क", "क") == "क"


def test_a_unit_falls_on_its_tokens_in_every_segment():
    prompt = "a red circle and a blue square"
    units = TextUnits.from_prompts([prompt], [["blue square", "red circle"]], tokenizers=BOTH)
    assert units.weights.shape == (1, 77 + 256, 2) and units.weights.dtype == torch.float32
    for column, text in enumerate(["blue square", "red circle"]):
        assert marked_text(CLIP, prompt, units.weights[0, :77, column], 77) == text
        assert marked_text(T5, prompt, units.weights[0, 77:, column], 256) == text
    assert set(units.weights.unique().tolist()) == {0.0, 1.0}


def test_all_pieces_of_a_unit_share_its_column():
    units = TextUnits.from_prompts(["a red dog and a blue cat"], [[["red", "dog", "cow"], "cat"]], tokenizers=CLIP)
    assert marked_text(CLIP, "a red dog and a blue cat", units.weights[0, :, 0], 77) == "red dog"
    assert units.names == [["red + dog + cow", "cat"]] and units.missing == [[]]


@pytest.mark.parametrize("tokenizers", [CLIP, BOTH], ids=["clip", "clip and t5"])
def test_normalized_columns_sum_to_one_over_all_segments(tokenizers):
    prompts, strings = ["a red circle on a stop sign", "a cow"], [["stop sign", "zebra"], ["cow"]]
    plain = TextUnits.from_prompts(prompts, strings, tokenizers=tokenizers)
    units = TextUnits.from_prompts(prompts, strings, tokenizers=tokenizers, normalize=True)
    torch.testing.assert_close(units.weights.sum(1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert torch.equal(units.weights > 0, plain.weights > 0)


def test_columns_are_padded_to_the_prompt_with_most_units_and_to_one():
    units = TextUnits.from_prompts(["a cat", "a cat and a dog", ""], [["cat"], ["dog", "cat"], []], tokenizers=BOTH)
    assert units.weights.shape[2] == 2
    assert units.names == [["cat"], ["dog", "cat"], []]
    assert units.weights[0, :, 1].sum() == 0 and units.weights[2].sum() == 0
    assert torch.equal(units.weights[0, :, 0].nonzero()[:1], torch.tensor([[2]]))
    assert TextUnits.from_prompts(["", "a cat"], [[], []], tokenizers=BOTH).weights.shape == (2, 333, 1)


def test_a_unit_that_is_not_in_the_prompt_is_missing_and_not_fatal():
    units = TextUnits.from_prompts(["a cat", ""], [["zebra", "cat"], ["cat"]], tokenizers=BOTH)
    assert units.missing == [["zebra"], ["cat"]] and units.truncated == [[], []]
    assert units.weights[0, :, 0].sum() == 0 and units.weights[0, :, 1].sum() > 0


def test_a_unit_that_every_tokenizer_cuts_off_is_reported_as_truncated():
    prompt = "a dog " + "and a " * 12 + "red circle and a cat"
    strings = [["dog", "red circle", "cat", "zebra"]]
    units = TextUnits.from_prompts([prompt], strings, tokenizers=CLIP, max_lengths=[25])
    assert units.missing == [["red circle", "cat", "zebra"]] and units.truncated == [["red circle", "cat"]]
    # What CLIP cuts off stands in the longer T5 sequence: found.
    units = TextUnits.from_prompts([prompt], strings, tokenizers=(CLIP, T5), max_lengths=[25, 256])
    assert units.missing == [["zebra"]] and units.weights[0, :25, 2].sum() == 0 and units.weights[0, 25:, 2].sum() > 0


def test_a_unit_cut_in_two_keeps_the_tokens_that_are_left():
    prompt = "a a a red circle"
    assert find(prompt, "red circle", length=6) == "red"


@given(
    st.lists(
        st.sampled_from(["a", "red", "Cat", "stop", "sign", '"Hello', 'World!"', ",", "café", "猫", "x²"]), max_size=30
    )
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_added_tokens_never_get_weight(words):
    prompt = " ".join(words)
    units = TextUnits.from_prompts([prompt], [[prompt] if words else []], tokenizers=BOTH, max_lengths=[20, 20, 24])
    for tokenizer, weights, length in ((CLIP, units.weights[0, :20, 0], 20), (T5, units.weights[0, 20:, 0], 24)):
        encoded = tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_special_tokens_mask=True
        )
        # The whole prompt is the unit: every token has weight but those that the tokenizer adds.
        assert (weights > 0).tolist() == [bool(words) and not added for added in encoded.special_tokens_mask]


@given(st.text(max_size=40), st.text(max_size=4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_text_is_taken(prompt, unit):
    if unit.strip() and any(unicodedata.category(c) not in ("Cf", "Mn") for c in unit.strip()):
        units = TextUnits.from_prompts([prompt], [[unit]], tokenizers=BOTH)
        assert units.weights.shape == (1, 333, 1)


def test_rows_do_not_depend_on_the_batch():
    prompts = ["a red circle", "", "a photo of a dog and a " + "very " * 90 + "big car"]
    strings = [["circle"], [], ["dog", "big car"]]
    units = TextUnits.from_prompts(prompts, strings, tokenizers=BOTH)
    for i in range(3):
        alone = TextUnits.from_prompts([prompts[i]], [strings[i]], tokenizers=BOTH)
        assert torch.equal(units.weights[i, :, : alone.weights.shape[2]], alone.weights[0])


def test_clip_tokenizers_that_split_differently_share_positions_by_union():
    # CLIP-G's tokenizer pads with "!", which makes that a token of its own: !! is one token of one, two of the other.
    other = tiny_models.tiny_clip_tokenizer(pad_token="!")
    prompt = "stop !! red dog"
    alone = [TextUnits.from_prompts([prompt], [["red"]], tokenizers=t).weights for t in (CLIP, other)]
    assert not torch.equal(*alone)
    both = TextUnits.from_prompts([prompt], [["red"]], tokenizers=(CLIP, other)).weights
    assert torch.equal(both, torch.maximum(*alone))


def test_tokenizers_share_positions_by_vocabulary_or_where_a_tuple_says_so():
    def length(tokenizers, **options):
        return TextUnits.from_prompts(["a"], [[]], tokenizers=tokenizers, **options).weights.shape[1]

    assert length((CLIP, CLIP, T5)) == length((CLIP, T5)) == length(((CLIP, CLIP), T5)) == 77 + 256
    assert length((CLIP, T5, CLIP)) == 77 + 256 + 77
    assert length(((CLIP, T5),)) == 77
    assert length(((CLIP,), (CLIP,))) == 154
    assert length((CLIP, CLIP, T5), max_lengths=(77, 77, 100)) == length((CLIP, CLIP, T5), max_lengths=(77, 100)) == 177
    assert length((CLIP, None), max_lengths=(77, 30)) == 107 and length((CLIP, CLIP, None)) == 333


def test_positions_without_a_tokenizer_have_no_weight():
    units = TextUnits.from_prompts(["a cat"], [["cat"]], tokenizers=(CLIP, None))
    assert units.weights[0, :77].sum() > 0 and units.weights[0, 77:].sum() == 0


@pytest.mark.parametrize("with_t5", [True, False], ids=["t5", "no t5"])
def test_from_pipeline_builds_the_text_axis_of_encode_prompt(with_t5):
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    small = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": len(CLIP)}
    small |= {"bos_token_id": CLIP.bos_token_id, "eos_token_id": CLIP.eos_token_id}
    encoders = [
        CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=size, intermediate_size=8, projection_dim=5, **small))
        for size in (4, 8)
    ]
    t5 = T5EncoderModel(T5Config(d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=len(T5)))
    pipe = StableDiffusion3Pipeline(
        transformer=tiny_models.tiny_transformer(),
        scheduler=None,
        vae=None,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=t5 if with_t5 else None,
        tokenizer=CLIP,
        tokenizer_2=CLIP,
        tokenizer_3=T5 if with_t5 else None,
    )
    prompts = ["a red circle", "a cat and a red circle"]
    embeddings = pipe.encode_prompt(prompts, None, None, device="cpu", max_sequence_length=40)[0]
    units = TextUnits.from_pipeline(pipe, prompts, [["red circle"]] * 2, max_sequence_length=40)
    assert units.weights.shape[:2] == embeddings.shape[:2] == (2, 117)
    assert marked_text(CLIP, prompts[1], units.weights[1, :77, 0], 77) == "red circle"
    if with_t5:
        assert marked_text(T5, prompts[1], units.weights[1, 77:, 0], 40) == "red circle"
    else:
        assert embeddings[:, 77:].abs().sum() == 0 and units.weights[:, 77:].sum() == 0
    assert TextUnits.from_pipeline(pipe, prompts, [[], []]).weights.shape[1] == 77 + 256


def test_what_a_template_writes_around_a_prompt_belongs_to_no_unit():
    before, after = chat_template(lambda prompt: f"a dog below: {prompt} a dog")
    units = TextUnits.from_prompts(
        ["a dog", ""], [["dog"], []], tokenizers=CLIP, max_lengths=[20], template=(before, after)
    )
    text = f"{before}a dog{after}"
    assert marked_text(CLIP, text, units.weights[0, :, 0], 20) == "dog" and text.count("dog") == 3
    ids = CLIP(text, padding="max_length", max_length=20)["input_ids"]
    (place,) = units.weights[0, :, 0].nonzero().flatten().tolist()
    assert ids[:place].count(ids[place]) == 1 and ids[place + 1 :].count(ids[place]) == 1
    for template in ("{}", ("a",), ("a", 1)):
        with pytest.raises(TypeError, match="^template"):
            TextUnits.from_prompts(["a"], [[]], tokenizers=CLIP, template=template)
    for render in (str.upper, lambda prompt: 2 * prompt):
        with pytest.raises(ValueError, match="^template: expected the prompt to stand once"):
            chat_template(render)


def test_rows_repeats_and_devices():
    units = TextUnits.from_prompts(["a cat", "a dog", ""], [["cat"], ["dog", "cow"], []], tokenizers=BOTH)
    assert len(units) == 3
    repeated = units.repeat_interleave(2)
    assert repeated.names == [["cat"], ["cat"], ["dog", "cow"], ["dog", "cow"], [], []]
    assert repeated.missing == [[], [], ["cow"], ["cow"], [], []]
    assert torch.equal(repeated.weights, units.weights.repeat_interleave(2, 0))
    for rows in (slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True]), [-2, -1]):
        picked = units[rows]
        assert picked.names == [["dog", "cow"], []] and torch.equal(picked.weights, units.weights[1:])
    assert units[-1].names == [[]] and units[-1].weights.shape == units.weights[:1].shape
    assert [row.names[0] for row in units] == units.names
    assert units.to("meta").weights.device.type == "meta" and units.to("meta").names == units.names
    with pytest.raises(IndexError):
        units[3]
    with pytest.raises(ValueError, match="rows"):
        units[3:]
    for repeats in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="repeats"):
            units.repeat_interleave(repeats)


class SlowTokenizer:
    is_fast = False

    def __call__(self, *args, **kwargs):
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "prompts", {"prompts": "a cat"}),
        (TypeError, "prompts", {"prompts": None}),
        (TypeError, "prompts", {"prompts": ["a cat", None]}),
        (ValueError, "prompts", {"prompts": [], "units": []}),
        (TypeError, "units", {"units": "cat"}),
        (TypeError, r"units\[0\]", {"units": ["cat"]}),
        (TypeError, r"units\[0\]\[0\]", {"units": [[3]]}),
        (TypeError, r"units\[0\]\[1\]", {"units": [["cat", ["a", 3]]]}),
        (ValueError, "units", {"units": [["cat"], ["dog"]]}),
        (ValueError, r"units\[0\]\[0\]", {"units": [[" "]]}),
        (ValueError, r"units\[0\]\[0\]", {"units": [[["cat", ""]]]}),
        (ValueError, r"units\[0\]\[0\]", {"units": [[[]]]}),
        (ValueError, "tokenizers", {"tokenizers": ()}),
        (TypeError, r"tokenizers\[1\]", {"tokenizers": (CLIP, "t5")}),
        (TypeError, r"tokenizers\[1\].*slow SlowTokenizer", {"tokenizers": (CLIP, SlowTokenizer())}),
        (TypeError, "max_lengths", {"max_lengths": 77}),
        (TypeError, "max_lengths", {"max_lengths": (77, 256.0)}),
        (ValueError, "max_lengths", {"max_lengths": (77, 0)}),
        (ValueError, "max_lengths", {"max_lengths": (77, 77, 77, 77)}),
        (ValueError, "max_lengths", {"max_lengths": (77, 78, 256)}),
        (ValueError, "max_lengths", {"max_lengths": (1, 256)}),
    ],
)
def test_bad_arguments_are_named(error, name, arguments):
    with pytest.raises(error, match=f"^{name}"):
        TextUnits.from_prompts(**{"prompts": ["a cat"], "units": [["cat"]], "tokenizers": BOTH, **arguments})


def test_a_pipeline_without_tokenizers_is_named():
    with pytest.raises(TypeError, match="^pipe.*tokenizer_3"):
        TextUnits.from_pipeline(SimpleNamespace(tokenizer=CLIP, tokenizer_2=CLIP), ["a"], [[]])


def test_hand_made_units_are_checked():
    with pytest.raises(ValueError, match="weights"):
        TextUnits(torch.zeros(2, 5), [[], []], [[], []], [[], []])
    with pytest.raises(ValueError, match="names"):
        TextUnits(torch.zeros(2, 5, 1), [[]], [[], []], [[], []])


@needs_data
def test_clip_finds_every_object_of_geneval(real_clip):
    lines = (tiny_models.DATA / "geneval_metadata.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if '"counting"' not in line]
    units = TextUnits.from_prompts(
        [record["prompt"] for record in records],
        [[_geneval_unit(requirement) for requirement in record["include"]] for record in records],
        tokenizers=real_clip,
    )
    assert units.weights.shape[:2] == (len(records), 77) and not any(units.missing)
    for record, weights, names in zip(records, units.weights, units.names, strict=True):
        for column, name in enumerate(names):
            assert marked_text(real_clip, record["prompt"], weights[:, column], 77) == name


def _geneval_unit(requirement):
    return " ".join([requirement[key] for key in ("color", "class") if key in requirement])


@needs_data
def test_clip_finds_the_quoted_text_of_ocr_prompts(real_clip):
    prompts = (tiny_models.DATA / "ocr_prompts.txt").read_text().splitlines()
    quoted = [re.findall(r'"([^"]+)"', prompt) for prompt in prompts]
    units = TextUnits.from_prompts(prompts, quoted, tokenizers=real_clip)
    assert sum(map(len, quoted)) > 1000 and units.missing == units.truncated
    assert sum(map(len, units.missing)) < 5
    for prompt, texts, weights in zip(prompts, quoted, units.weights, strict=True):
        for column, text in enumerate(texts):
            seen = marked_text(real_clip, prompt, weights[:, column], 77)
            wanted = " ".join(text.lower().split())
            # Punctuation that CLIP keeps in one token with the closing quote may come along.
            assert not seen or wanted.startswith(seen.lower().split("|")[0][: len(wanted)].strip())


@needs_data
def test_every_real_clip_token_is_found_by_its_own_characters(real_clip):
    """The offsets that the alignment rests on belong to the prompt as written, whatever the tokenizer normalises."""
    prompts = (tiny_models.DATA / "ocr_prompts.txt").read_text().splitlines()[:200]
    encoded = real_clip([prompt.replace(" ", "  ") for prompt in prompts], return_offsets_mapping=True)
    for prompt, ids, offsets in zip(prompts, encoded.input_ids, encoded.offset_mapping, strict=True):
        doubled = prompt.replace(" ", "  ")
        if doubled.isascii():
            for token, (begin, end) in zip(real_clip.convert_ids_to_tokens(ids)[1:-1], offsets[1:-1], strict=True):
                assert token.removesuffix("</w>") == doubled[begin:end].lower()


@pytest.mark.parametrize("dropped", [-1, 1.5, True])
def test_what_is_dropped_is_a_number_of_tokens(dropped: object) -> None:
    with pytest.raises(ValueError, match="^dropped: expected a number of tokens"):
        TextUnits.from_prompts(["a cat"], [["cat"]], tokenizers=T5, dropped=dropped)
