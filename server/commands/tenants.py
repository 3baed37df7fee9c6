"""`lorakeet keys` and `lorakeet tenants`: keys and tenants of a running server."""

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from server.commands.listing import AsJson, show_json, show_rows
from server.commands.remote import DEFAULT_URL, ApiKey, CommandError, Url, checked, connect, get_json

keys = typer.Typer(name="keys", no_args_is_help=True, help="Make, list and revoke keys.")
tenants = typer.Typer(name="tenants", no_args_is_help=True, help="Make, list and remove tenants.")

Tenant = Annotated[str | None, typer.Option(help="The tenant; by default that of the API key.")]
LimitOptions = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="NAME=NUMBER", help="Such as requests_per_minute=600; repeatable."),
]
Ids = Annotated[list[str], typer.Argument(metavar="ID...")]


@keys.command("create")
def create_key(
    tenant: Tenant = None,
    role: Annotated[list[str] | None, typer.Option(help="serve (default), upload, tune or admin; repeatable.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Only for this adapter and the base; repeatable.")] = None,
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    days: Annotated[float | None, typer.Option(help="Days until it expires.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a key and print its secret, which cannot be shown again."""
    body: dict[str, Any] = {"name": name, "roles": role or ["serve"], "tenant": tenant}
    body |= {"adapters": adapter or None, "expires_in_days": days}
    with connect(url, api_key) as client:
        made = checked(client.post("/v1/admin/keys", json=body)).json()
    if as_json:
        show_json(made)
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print("Save this secret: it cannot be shown again.")
    print(made["secret"])


@keys.command("list")
def list_keys(tenant: Tenant = None, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show keys, without their secrets."""
    with connect(url, api_key) as client:
        found = get_json(client, "/v1/admin/keys" + (f"?tenant={quote(tenant)}" if tenant else ""))["data"]
    if as_json:
        show_json(found)
        return
    rows = [
        (
            key["id"],
            key["tenant"],
            key["name"],
            ",".join(key["roles"]),
            "all" if key["adapters"] is None else ",".join(key["adapters"]),
            "revoked" if key["revoked_at"] else _day(key["expires_at"], "never"),
            _day(key["last_used_at"], "never"),
        )
        for key in found
    ]
    show_rows(("ID", "TENANT", "NAME", "ROLES", "ADAPTERS", "EXPIRES", "LAST USED"), rows)


@keys.command("revoke")
def revoke_keys(ids: Ids, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Revoke keys at once."""
    with connect(url, api_key) as client:
        for id_ in ids:
            checked(client.delete(f"/v1/admin/keys/{quote(id_, safe='')}"))
            print(f"{id_} is revoked")


@tenants.command("create")
def create_tenant(
    id_: Annotated[str, typer.Argument(metavar="ID")],
    limit: LimitOptions = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a tenant; `lorakeet keys create --tenant ID` makes it a key."""
    with connect(url, api_key) as client:
        checked(client.post("/v1/admin/tenants", json={"id": id_, "limits": _limits(limit)}))
    print(f"{id_} is created")


@tenants.command("limit")
def limit_tenant(
    id_: Annotated[str, typer.Argument(metavar="ID")],
    limit: LimitOptions = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Replace a tenant's limits."""
    with connect(url, api_key) as client:
        checked(client.post(f"/v1/admin/tenants/{quote(id_, safe='')}", json={"limits": _limits(limit)}))
    print(f"{id_} has {len(limit or ())} limits")


@tenants.command("list")
def list_tenants(as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show tenants."""
    with connect(url, api_key) as client:
        found = get_json(client, "/v1/admin/tenants")["data"]
    if as_json:
        show_json(found)
    else:
        limits = [
            {name: number for name, number in tenant["limits"].items() if number and name != "weight"}
            for tenant in found
        ]
        shown = [" ".join(f"{name}={number}" for name, number in each.items()) for each in limits]
        rows = [(tenant["id"], _day(tenant["created_at"], ""), text) for tenant, text in zip(found, shown, strict=True)]
        show_rows(("ID", "SINCE", "LIMITS"), rows)


@tenants.command("rm")
def remove_tenants(ids: Ids, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Delete tenants without adapters and files, together with their keys."""
    with connect(url, api_key) as client:
        for id_ in ids:
            checked(client.delete(f"/v1/admin/tenants/{quote(id_, safe='')}"))
            print(f"{id_} is deleted")


def _limits(given: list[str] | None) -> dict[str, float]:
    pairs = [text.partition("=") for text in given or ()]
    if wrong := [name for name, _, number in pairs if not number.replace(".", "", 1).isdecimal()]:
        raise CommandError(f"--limit {wrong[0]}: expected NAME=NUMBER")
    return {name: float(number) if "." in number else int(number) for name, _, number in pairs}


def _day(when: int | None, otherwise: str) -> str:
    return otherwise if when is None else time.strftime("%Y-%m-%d", time.gmtime(when))
