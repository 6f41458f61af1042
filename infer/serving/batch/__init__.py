"""Files of requests, answered by the engine into files of answers.

requests.py reads lines in our own form, own_form.py makes jobs of them, and answering.py has them carried out;
openai_form.py reads lines in OpenAI's form, which the server's endpoints answer. answer_file.py writes the answers and
goes on after an interruption, json_lines.py reads files line by line. ray_pipeline.py does it with many files on many
machines, workers.py is what each of these is told, and does.
"""

from .answer_file import AnswerFile as AnswerFile
from .answering import answer_all as answer_all
from .answering import room_for as room_for
from .own_form import Defaults as Defaults
from .requests import Request as Request
from .requests import read_requests as read_requests
