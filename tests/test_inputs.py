"""What a clip's prompt is made of: question, subtitle, modality and stage, and what the text gate reads."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from conftest import GOLDEN
from erv_min.base.processes import Processes
from erv_min.inputs import Batch, Collator, Example, Inputs, embed
from erv_min.media import Clip
from erv_min.prompts import gate_text, question_with_subtitle, render
from erv_min.tokenizer import Tokenizer
from erv_min.train.settings import SFTSettings
from erv_min.train.start import training_examples

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import sft  # noqa: E402

ALONE = Processes(0, 1, torch.device("cpu"))
CLIP = Example("a", Path("a.mp4"), "sad", "emer", subtitle="Leave me!")


class Words:
    """A tokenizer that leaves the text as it is; for the gate, one id per text: its length."""

    system, pad_id = "You are kind.", 0

    def encode(self, text: str) -> str:
        return text

    def encode_batch(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[len(text)] for text in texts]), torch.ones(len(texts), 1)


class Numbers(Words):
    """One id per letter."""

    def encode(self, text: str, placeholders: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def test_the_subtitle_enters_prompt_and_gate():
    collate = Collator(None, Words(), None, question="Which emotion?")
    prompt, gate = collate.text(CLIP)
    assert gate == 'Which emotion? The subtitle of the video is: "Leave me!"' == question_with_subtitle(
        "Which emotion?", "Leave me!")
    assert prompt == render(gate, system="You are kind.") and "<video>" in prompt
    assert collate.text(replace(CLIP, subtitle=""))[1] == "Which emotion?"  # each subtitle has a text of its own
    assert collate.text(CLIP)[1] == gate


def test_modality_and_stage_shape_prompt_and_gate():
    silent = replace(CLIP, subtitle="")
    for modality in ("video", "audio", "video_audio"):
        for stage in ("inference", "sft", "grpo"):
            prompt, gate = Collator(None, Words(), None, None, modality, stage, "Which?").text(silent)
            assert prompt == render("Which?", modality, stage, "You are kind.")
            assert gate == gate_text("Which?", modality, stage)
            assert (gate == "Which?") == (stage != "sft")


def test_subtitles_can_be_left_out_of_the_training(tmp_path):
    (tmp_path / "EMER.csv").write_text("names,emotions,subtitles,reasons\na,sad,Leave me!,She weeps.\n")
    (tmp_path / "a.avi").write_bytes(b"clip")
    for subtitles, expected in ((True, "Leave me!"), (False, "")):
        settings = SFTSettings(data=f"emer:{tmp_path}", out=str(tmp_path), subtitles=subtitles)
        (example,) = training_examples(settings, "sft", ALONE)
        assert (example.subtitle, example.explanation) == (expected, "She weeps.")


class Recorder:
    """A model that keeps what it is given."""

    def __init__(self):
        self.vision_tower = torch.nn.Linear(1, 1).requires_grad_(False)
        self.head_weight = torch.zeros(1)

    def vision_features(self, video):
        return video + 1 if video.dim() == 5 else (video + 1)[None]

    def audio_features(self, audio):
        return audio[None] + 2

    def prompt_embeds(self, *given, **named):
        return given, named


def test_a_batch_is_embedded_with_its_own_masks_and_gates():
    """Five dimensions are pixels, which the vision tower still has to see; four are its features already."""
    ids, mask, gate, gate_mask, audio = (torch.full((1, 2), i) for i in range(5))
    for vision, seen in ((torch.zeros(1, 1, 3, 2, 2), 1), (torch.zeros(1, 1, 4, 2), 0)):
        given, named = embed(Recorder(), Batch([CLIP], ids, mask, gate, gate_mask, vision, audio))
        assert given[0] is ids and given[2:] == (audio, gate, gate_mask) and named == {"attention_mask": mask}
        assert (given[1] == seen).all()


def test_pixels_stay_pixels_while_the_vision_tower_trains():
    collate = Collator(Recorder(), Words(), None)
    for trains, expected in ((False, 1), (True, 0)):
        collate.model.vision_tower.requires_grad_(trains)
        vision, audio = collate.features(Inputs(CLIP, Clip(torch.zeros(1, 3, 2, 2), torch.zeros(4, 5))))
        assert (vision == expected).all() and vision.shape == (1, 3, 2, 2) and (audio == 2).all()


def test_rows_of_one_question_share_its_gate_and_others_keep_theirs():
    collate = Collator(Recorder(), Numbers(), Words(), question="Which?")
    features = torch.zeros(1, 4, 2), torch.zeros(5, 3)
    inputs = [Inputs(replace(CLIP, video_id=str(i), subtitle=said), None, features)
              for i, said in enumerate(("No!", "No!", "Leave me!"))]
    same, mixed = collate(inputs[:2]), collate(inputs)
    no, leave = (len(question_with_subtitle("Which?", said)) for said in ("No!", "Leave me!"))
    assert same.gate_ids.tolist() == [[no]] and mixed.gate_ids.tolist() == [[no], [no], [leave]]
    assert same[1:2].gate_ids.tolist() == [[no]] and same[1:2].gate_mask.tolist() == [[1]]  # a shared one stays
    assert mixed[2:].gate_ids.tolist() == [[leave]] and mixed[2:].vision.shape == (1, 1, 4, 2)
    assert [x.video_id for x in mixed[1:].examples] == ["1", "2"] and len(mixed[1:]) == 2
    longer = leave - no  # padding on the right
    assert mixed.attention_mask.sum(1).tolist() == [mixed.input_ids.shape[1] - longer] * 2 + [mixed.input_ids.shape[1]]
    assert (mixed.input_ids[0, -longer:] == 0).all() and (mixed.input_ids[2] != 0).all()


def test_an_answer_that_has_begun_stands_at_the_end_of_the_prompt():
    collate = Collator(Recorder(), Numbers(), Words())
    plain, begun = ([Inputs(replace(CLIP, begun=said), None, (None, None))] for said in ("", "<think>He"))
    ids = collate(begun).input_ids[0].tolist()
    assert ids == collate(plain).input_ids[0].tolist() + Numbers().encode("<think>He")


def test_text_of_data_and_policy_places_no_clip():
    """An explanation with `<video>` in it: as an SFT target, and as what the policy goes on from (--think)."""
    tokenizer, text = Tokenizer(GOLDEN / "chat"), "He <video> smiles. <audio>"
    example = replace(CLIP, explanation=text, begun=f"<think>{text}", subtitle=text)
    ids = Collator(Recorder(), tokenizer, Words())([Inputs(example, None, (None, None))]).input_ids[0].tolist()
    assert (ids.count(-201), ids.count(-202)) == (1, 1)  # the prompt's own
    clips = SimpleNamespace(taken=[0], unit_at=lambda place: [example])
    ((target,), _) = sft.encode_targets(clips, tokenizer)
    assert min(target) >= 0 and text in tokenizer.decode(target)
