"""Hypernetworks: what they read, what they predict, and whom they fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from regraft.core.errors import InputError, Unsupported
from regraft.plugins.tokenizer_retrofit.hypernet import Shape, open_hypernet, predict
from tests.plugins.tokenizer_retrofit import toys

CONFIG = {
    "hn_model_type": "roberta", "n_embd": 64, "hn_hidden_size": 32, "hn_intermediate_size": 48, "hn_n_layers": 1,
    "hn_num_attention_heads": 2, "hn_surface_maxlen": 5, "original_vocab_size": 300, "pad_token_id": 0,
    "hn_rescale_embeddings": True, "hn_n_extra_tokens": 3,
}  # fmt: skip


def save(folder, **changes):
    """A random network."""
    from regraft.plugins.tokenizer_retrofit.hypernet import Hypernet

    config = {**CONFIG, **changes}
    torch.manual_seed(0)
    network = Hypernet(Shape.of(config, "x"))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"separate_out_embeddings": True}, {"separate_out_embeddings": True, "hn_single_head": True},
     {"hn_concat_last_hidden_state": True}, {"hn_predict_bias": True}],
)  # fmt: skip
def test_rows_do_not_depend_on_their_order_nor_on_padding(tmp_path, changes):
    network = open_hypernet(save(tmp_path / "net", **changes))
    table = torch.randn(310, network.shape.read)
    spellings = [[5, 6], [7], [301, 8, 9, 10, 11], [4] * 9]
    first, second, bias = predict(network, spellings, table)
    assert first.shape == (4, 64)
    assert (second is not None) == ("separate_out_embeddings" in changes)
    assert (bias is not None) == ("hn_predict_bias" in changes)
    order = [2, 0, 3, 1]
    again, _, _ = predict(network, [spellings[index] for index in order], table)
    torch.testing.assert_close(again, first[order])
    if not network.shape.concatenated:
        changed = table.clone()
        changed[0] += 100  # the row of the padding id
        torch.testing.assert_close(predict(network, spellings, changed)[0], first)
    shorter, _, _ = predict(network, [[4] * 5], table)
    torch.testing.assert_close(shorter[0], first[3])


def test_the_language_is_read_as_one_more_position(tmp_path):
    network = open_hypernet(save(tmp_path / "net", hn_embed_lang_id=True, n_langs=3))
    table = torch.randn(300, 64)
    one, other = (predict(network, [[5, 6]], table, language)[0] for language in (0, 2))
    assert not torch.allclose(one, other, atol=1e-3)
    with pytest.raises(InputError, match="reads a language"):
        predict(network, [[5]], table)


def test_new_tokens_get_predicted_rows_and_old_ones_keep_theirs(tmp_path):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base", tie_word_embeddings=False)
    net = save(tmp_path / "net", separate_out_embeddings=True)
    before, after, patch = toys.retrofit(folder, corpus, init="hypernet", hypernet={"folder": net})
    rows = before.config["vocab_size"]
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tables = [before.load(name) for name in names]
    parts = list(json.loads(patch.reports["id_map.json"].read())["composed_of"].values())
    wanted = predict(open_hypernet(net), parts, torch.cat(tables, 1))
    for name, old, made in zip(names, tables, wanted[:2], strict=True):
        assert torch.equal(after.load(name)[:rows], old)
        torch.testing.assert_close(after.load(name)[rows:], made)


def test_networks_of_other_models_and_broken_folders_are_refused(tmp_path):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base", tie_word_embeddings=True)
    net = save(tmp_path / "separate", separate_out_embeddings=True)
    with pytest.raises(Unsupported, match="another kind of head"):
        toys.retrofit(folder, corpus, init="hypernet", hypernet={"folder": net})
    with pytest.raises(InputError, match="made for another model"):
        toys.retrofit(folder, corpus, init="hypernet", hypernet={"folder": save(tmp_path / "narrow", n_embd=32)})
    broken = save(tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps({**CONFIG, "hn_hidden_size": 64}))
    with pytest.raises(InputError, match="do not fit its config"):
        open_hypernet(broken)
    (broken / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no config of a hypernetwork"):
        open_hypernet(broken)
