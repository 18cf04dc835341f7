"""The text that tells the scenarios apart: several phrasings each, from three words to a paragraph."""

from __future__ import annotations

import numpy as np

PHRASES: dict[str, tuple[str, ...]] = {
    "my_way_home": (
        "a maze of metal rooms",
        "the dark steel labyrinth with grey panels, walking from room to room to find the way home",
        "wandering through a maze of connected rooms with metal walls, rusty brown panels and bright windows",
        "my way home, a first person walk in a grey industrial maze, one room after another, doors and corners",
        "explore a labyrinth of small rooms and corridors, some grey metal, some with coloured walls",
    ),
    "basic": (
        "a monster in a brick room",
        "a square brown brick room with a dark grated ceiling and one monster at the far wall",
        "the basic shooting range, a cacodemon floats in front of a stone brick wall, pistol in hand",
        "a simple rectangular room of brown bricks and a sandy floor, a single red demon waits opposite the player",
        "stand in a brick hall and shoot the monster by the wall",
    ),
    "deadly_corridor": (
        "a deadly corridor with soldiers",
        "a narrow brown stone corridor where armed soldiers shoot from both sides and a green vest lies at the end",
        "run down the dark tunnel of carved brown stone, zombies with shotguns in the alcoves",
        "the deadly corridor, a long passage with guards in pairs, gun smoke on brown walls",
        "fight along a dim corridor guarded by six soldiers",
    ),
    "health_gathering": (
        "gathering medkits on green acid",
        "a wide green acid floor under a night sky, white medkits are scattered everywhere",
        "health gathering, collect the white health packs on the poisonous green slime field before you die",
        "an open field of green toxic slime surrounded by a low mossy wall, dark blue sky, medical kits on the ground",
        "walk over glowing green slime and pick up medkits",
    ),
    "defend_the_center": (
        "defend the center of the arena",
        "stand in the center of a round arena with grey tiles and brown walls while pink monsters close in from all "
        "sides",
        "a circular arena under a dark sky, pink demons and marines attack, turn and shoot them with the pistol",
        "defend the centre, a wide round room, monsters come closer and explode in red",
        "turning around in the middle of a circular arena full of monsters",
    ),
    "take_cover": (
        "take cover from fireballs",
        "a wide grey hall, imps at the far brown wall throw fireballs at you, dodge left and right",
        "take cover, fireballs fly across a large grey room with a low brick wall at the end",
        "dodging orange fireballs thrown by a row of demons in a long grey concrete hall",
        "strafe in a grey hall to avoid burning projectiles",
    ),
}  # fmt: skip
OPENINGS = ("", "", "a video of ", "first person view: ", "please show me ", "a live game stream, ", "imagine ",
            "photorealistic, highly detailed, ", "classic 1990s pixel shooter, ", "the player sees ")  # fmt: skip
ENDINGS = ("", "", ", smooth camera motion", ", 24 frames per second, sharp textures, consistent lighting",
           ", played by an expert who explores every corner and always looks around before moving on",
           " in the style of an old computer game", ", seen from the eyes of a space marine")  # fmt: skip


def sample_prompt(scenario: str, rng: np.random.Generator) -> str:
    return f"{rng.choice(OPENINGS)}{rng.choice(PHRASES[scenario])}{rng.choice(ENDINGS)}"
