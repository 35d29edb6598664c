"""Audio as tokens: waveforms sample by sample, the codes of a learned codec, and polyphonic music as notes."""

from importlib import import_module

from zoo import registry

DATASETS = {
    "audio/spoken_digits": "tasks.audio.data:SpokenDigits",
    "audio/folder": "tasks.audio.folder:Folder",
    "music/jsb": "tasks.audio.scores:Jsb",
    "music/nottingham": "tasks.audio.scores:Nottingham",
    "music/piano_midi": "tasks.audio.scores:PianoMidi",
}
TASKS = {
    "audio": "tasks.audio.task:AudioTask",
    "audio_codec": "tasks.audio.codec_task:CodecTask",
    "audio_classifier": "tasks.audio.classifier:ClassifierTask",
    "music": "tasks.audio.music:MusicTask",
}
HEADS = {
    "audio_samples": "tasks.audio.sample_head:SampleHead",
    "audio_codes": "tasks.audio.code_head:CodeHead",
    "music_notes": "tasks.audio.music_heads:NotesHead",
    "music_keys": "tasks.audio.music_heads:KeysHead",
}


def register() -> None:
    """Names of the domain; what they stand for is imported on first use."""
    for kind, names in ((registry.tasks, TASKS), (registry.datasets, DATASETS), (registry.heads, HEADS)):
        for name, target in names.items():
            kind.add(name, target)
    import_module("tasks.audio.models")
