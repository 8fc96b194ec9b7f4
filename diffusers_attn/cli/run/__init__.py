"""`diffusers-attn run`: a pipeline, a prompt, all GPUs of this machine; a picture or a video.

`command` checks the arguments and starts the processes (`launch`); `worker` is one of them. The `settings` go to the
processes, and the result comes back, as JSON files in a temporary folder.
"""
