@echo off
rem What weights in fewer bits cost: speed of a step beside 16 bits, and perplexity beside 32.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" quants %*
exit /b %ERRORLEVEL%
