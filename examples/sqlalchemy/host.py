# A host with SQLAlchemy: the event is published when its transaction commits, or never.
import json
import os

from sqlalchemy import create_engine, text

engine = create_engine(os.environ["DATABASE_URL"].replace("postgres://", "postgresql+psycopg://", 1))
insert = text("INSERT INTO shop_orders (id, state) VALUES (:order, 'paid')")
publish = text("SELECT messenger.publish(CAST(:receiver AS bigint), 'order.paid', CAST(:data AS jsonb), :key)")


def pay(order, receiver, card_works=True):
    with engine.begin() as transaction:  # commits at its end, rolls back after an exception
        transaction.execute(insert, {"order": order})
        data = json.dumps({"order": order})
        transaction.execute(publish, {"receiver": receiver, "data": data, "key": f"order-{order}"})
        if not card_works:
            raise ValueError("the card was declined")


pay(1, os.environ["RECEIVER"])
try:
    pay(2, os.environ["RECEIVER"], card_works=False)
except ValueError as error:
    print(error)
