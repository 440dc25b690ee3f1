"""Eight families of encoders, tiny and of random weights, each with a tokenizer of its own kind: folders such
as pretrained encoders come in. Built offline, in a second."""
import functools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lad_nb.toy import toy_examples, toy_split

SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
ROWS = dict(train=48, dev=40, test=16)  # of the toy task: enough for six updates of eight rows
BERT = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
ROBERTA = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')  # its padding has id 1
MPNET = ('<s>', '<pad>', '</s>', '[UNK]', '<mask>')
MODERN = ('[UNK]', '[CLS]', '[SEP]', '[PAD]', '[MASK]')


@dataclass(frozen=True)
class Family:
    """What is known of a family beforehand, and held against what the library finds."""
    name: str          # as people say it
    model_type: str    # as config.json says it
    kind: str          # of pieces
    special: tuple     # its special tokens, in the order of their ids
    tokenizer: str     # its class
    layers: str        # where they are, below the base model
    token_types: bool  # whether its tokenizer makes them
    beside: tuple      # parts with weights beside its layers, in order
    settings: dict = field(default_factory=dict)

    @property
    def pad(self):
        return next(token for token in self.special if 'pad' in token.lower())


WORDS, BYTES, UNIGRAM = 'word pieces', 'byte-level pieces', 'Unigram pieces'
PAIR = ('embeddings', 'pooler')
ALL = [
    Family('BERT', 'bert', WORDS, BERT, 'BertTokenizer', 'encoder.layer', True, PAIR),
    Family('RoBERTa', 'roberta', BYTES, ROBERTA, 'RobertaTokenizer', 'encoder.layer', False, ('embeddings',),
           dict(type_vocab_size=1, max_position_embeddings=66)),
    Family('XLM-R', 'xlm-roberta', UNIGRAM, ROBERTA, 'XLMRobertaTokenizer', 'encoder.layer', False,
           ('embeddings',), dict(type_vocab_size=1, max_position_embeddings=66)),
    Family('ELECTRA', 'electra', WORDS, BERT, 'BertTokenizer', 'encoder.layer', True,
           ('embeddings', 'embeddings_project'), dict(embedding_size=24)),
    Family('MPNet', 'mpnet', WORDS, MPNET, 'MPNetTokenizer', 'encoder.layer', False,
           ('embeddings', 'encoder.relative_attention_bias'), dict(max_position_embeddings=66)),
    Family('DistilBERT', 'distilbert', WORDS, BERT, 'DistilBertTokenizer', 'transformer.layer', False,
           ('embeddings',)),
    Family('DeBERTa-v2', 'deberta-v2', UNIGRAM, BERT, 'DebertaV2Tokenizer', 'encoder.layer', True,
           ('embeddings', 'encoder.rel_embeddings', 'encoder.LayerNorm'),
           dict(relative_attention=True, position_buckets=8, pos_att_type=['p2c', 'c2p'], share_att_key=True,
                norm_rel_ebd='layer_norm', position_biased_input=False, max_relative_positions=-1,
                type_vocab_size=0)),
    Family('ModernBERT', 'modernbert', BYTES, MODERN, 'TokenizersBackend', 'layers', False,
           ('embeddings', 'final_norm'),
           dict(local_attention=8, global_attn_every_n_layers=3, cls_token_id=1, sep_token_id=2,
                bos_token_id=1, eos_token_id=2))]
FAMILIES = {family.name: family for family in ALL}


@functools.cache
def sentences():
    """What the tokenizers learn from: the toy task's sentences."""
    return [row[column] for row in toy_examples(600) for column in ('sentence1', 'sentence2')]


def word_pieces(special):
    """Letters, and the most frequent words: a trainer of word pieces gives something else each time."""
    words = Counter(re.findall('[a-z]+', ' '.join(sentences())))
    letters = sorted(set(''.join(words)))
    pieces = [*special, '.', *letters, *(f'##{c}' for c in letters), *(w for w, _ in words.most_common(150))]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def byte_pieces(special):
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer, trainers.BpeTrainer(vocab_size=440, special_tokens=special, show_progress=False,
                                          initial_alphabet=alphabet)


def unigram_pieces(special):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    unknown = next(token for token in special if 'unk' in token.lower())
    return tokenizer, trainers.UnigramTrainer(vocab_size=240, special_tokens=special, unk_token=unknown,
                                              show_progress=False)


TRAINERS = {BYTES: byte_pieces, UNIGRAM: unigram_pieces}


@functools.cache
def learned(kind, special):
    """A tokenizer of a kind that has seen the toy task: so few pieces that most words fall apart."""
    tokenizer, trainer = TRAINERS[kind]([*special])
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


def make_tokenizer(family):
    """A tokenizer of the family's own class."""
    make = getattr(transformers, family.tokenizer, None)
    if family.kind == WORDS: return make(vocab=word_pieces(family.special), model_max_length=64)
    tokenizer = learned(family.kind, family.special)
    if family.model_type == 'modernbert': return modern_tokenizer(tokenizer)
    said = json.loads(tokenizer.to_str())['model']
    vocabulary = said['vocab']
    if family.kind == UNIGRAM: vocabulary = [tuple(pair) for pair in vocabulary]
    if family.kind == BYTES: said = dict(merges=[tuple(pair) for pair in said['merges']])
    else: said = {}
    return make(vocab=vocabulary, model_max_length=64, **said)


def modern_tokenizer(tokenizer):
    """ModernBERT has no tokenizer class: its folder names its inputs and its special tokens."""
    tokenizer.post_processor = processors.TemplateProcessing(
        '[CLS] $A [SEP]', '[CLS] $A [SEP] $B [SEP]', [('[CLS]', 1), ('[SEP]', 2)])
    tokenizer.decoder = decoders.ByteLevel()
    names = {f'{name}_token': f'[{name.upper()}]' for name in ('unk', 'cls', 'sep', 'pad', 'mask')}
    inputs = ['input_ids', 'attention_mask']
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64,
                                                model_input_names=inputs, **names)


def make_config(family, tokenizer, **settings):
    """Settings of a tiny model."""
    settings = SIZES | dict(max_position_embeddings=64) | family.settings | settings
    pad = tokenizer.convert_tokens_to_ids(family.pad)
    return transformers.AutoConfig.for_model(family.model_type, vocab_size=len(tokenizer), pad_token_id=pad,
                                             initializer_range=.1, **settings)


def make_folder(family, folder, **settings):
    """A pretrained encoder as it comes: with the head that it was pretrained with, and its tokenizer."""
    tokenizer = make_tokenizer(family)
    config = make_config(family, tokenizer, **settings)
    torch.manual_seed(0)
    whole = family.model_type in ('bert', 'electra')  # with a pooler; a discriminator
    auto = transformers.AutoModelForPreTraining if whole else transformers.AutoModelForMaskedLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_rows(folder):
    """Some of the toy task's rows, as files."""
    folder = Path(folder)
    folder.mkdir()
    for split, n in ROWS.items():
        rows = toy_split(split)
        table = rows.select(range(n)).to_pandas().drop(columns='idx')
        if 'label' in table: table['label'] = table.label.map(rows.features['label'].int2str)
        table.to_csv(folder/f'{split}.tsv', sep='\t', index=False)
    return folder
