@echo off
rem Runs the checks and all tests; makes what they need. Arguments go to pytest.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" test %*
exit /b %ERRORLEVEL%
