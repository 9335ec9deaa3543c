@echo off
rem Lets LangChain, LlamaIndex, pydantic-ai, instructor and Vercel's AI SDK use the API: chat, stream, tool, object.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" clients %*
exit /b %ERRORLEVEL%
