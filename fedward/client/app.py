"""The site's Flower ClientApp: every message type is a letter for the agent."""

from contextlib import AbstractContextManager, nullcontext

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedward.client.agent import Agent
from fedward.errors import IdentityError, SiteCode
from fedward.messages import SESSION_ACTIONS


def client_app(agent: Agent, letter: AbstractContextManager[object] | None = None) -> ClientApp:
    """Make the ClientApp of one site, which is inside ``letter`` while it answers one.

    Its handlers are ``train`` (the task), ``train.hello`` … ``train.unmask`` (a session),
    ``train.second`` (the second pass of a round) and ``evaluate``. A message whose signature does
    not hold gets a Flower error with a fixed text, because its sender is unknown; nothing that a
    library says about an error ever leaves.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            with letter or nullcontext():
                return Message(agent.answer(message.content), reply_to=message)
        except IdentityError:
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, SiteCode.REFUSED_SIGNATURE.value)
            return Message(error, reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    for action in (*SESSION_ACTIONS, "second"):
        app.train(action)(handle)
    return app
