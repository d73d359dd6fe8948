"""Seed-OSS: Llama's layers, each linear with or without a bias."""

from .family import Family

SEED_OSS = Family(name="seed_oss", prefix="SeedOss")
