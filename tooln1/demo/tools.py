"""The demo's tools, as data: what each takes, and how people ask for it.

A tool is (name, description, {parameter: (type, description, kind of value, default)}, phrasings); the default is
None where the parameter is required. In a phrasing

    {city}              stands for the value, and asks for the parameter
    {breakfast:true}    says nothing, and asks for the parameter with this value
    [A|B]               is left out, or is one of A and B; only what is asked for is in the right call

A kind of value is a key of VALUES, "a|b" to choose from, "2-14" a range (with a point: in tenths), or "city*" a list
of two or three. The tools of a family are siblings, made to be confused with each other; families are told apart by
a blank line.
"""

from __future__ import annotations

VALUES = {
    "city": "Paris London Berlin Madrid Rome Vienna Oslo Dublin Lisbon Athens Tokyo Delhi Cairo Lima Boston Denver "
    "Austin Miami Prague Warsaw Zurich Geneva Munich Seoul Osaka Dakar Quito Perth Milan Naples",
    "person": "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa "
    "Sam Tina Uma Victor Wendy Xavier Yara Zoe",
    "song": "Yesterday Imagine Thriller Hello Creep Halo Roxanne Angie Layla Jolene Vogue Africa Dreams Zombie",
    "genre": "rock jazz blues pop folk soul metal techno",
    "item": "apples bread milk coffee tea rice eggs cheese butter honey pasta soap paper pens batteries candles",
    "dish": "lasagna risotto paella ramen curry tacos goulash chili pancakes omelette pierogi falafel",
    "topping": "mushroom pepperoni spinach onion salami tuna olive",
    "room": "kitchen bedroom bathroom office garage hallway attic cellar nursery library pantry studio",
    "symbol": "AAPL MSFT NVDA TSLA AMZN GOOG META INTC ORCL NFLX",
    "currency": "EUR USD GBP JPY CHF SEK INR BRL",
    "topic": "budget hiring roadmap security marketing design testing sales",
    "activity": "running cycling swimming rowing yoga boxing",
    "author": "Orwell Austen Tolstoy Kafka Borges Woolf Camus Hemingway",
    "movie": "Alien Casablanca Vertigo Gladiator Inception Titanic Rocky Amadeus",
    "language": "French German Spanish Italian Polish Korean Hindi Turkish",
    "word": "house river mountain friend winter garden window bridge forest",
}

FAMILIES = [
    [
        (
            "get_temperature",
            "Current temperature of a city",
            {
                "city": ("str", "City", "city", None),
                "unit": ("str", "celsius or fahrenheit", "celsius|fahrenheit", "celsius"),
            },
            [
                "How warm is it in {city}[ in {unit}]?",
                "Temperature in {city}[ in {unit}], please.",
                "Tell me how hot {city} is[ in {unit}].",
            ],
        ),
        (
            "get_forecast",
            "Weather of the next days",
            {"city": ("str", "City", "city", None), "days": ("int", "Days", "2-14", None)},
            ["Give me a {days} day forecast for {city}.", "How will the weather be in {city} for {days} days?"],
        ),
        (
            "get_humidity",
            "Current humidity of cities",
            {"cities": ("List[str]", "Cities", "city*", None)},
            ["How humid is it in {cities}?", "Check the humidity of {cities}."],
        ),
        (
            "get_wind",
            "Current wind speed",
            {"city": ("str", "City", "city", None), "gusts": ("bool", "With gusts", "", False)},
            [
                "How windy is it in {city}?[ Show gusts.{gusts:true}]",
                "Check the wind in {city}[ with gusts{gusts:true}| without gusts{gusts:false}].",
            ],
        ),
    ],
    [
        (
            "book_flight",
            "Book a flight",
            {
                "origin": ("str", "From", "city", None),
                "destination": ("str", "To", "city", None),
                "seats": ("int", "Seats", "2-9", 1),
            },
            [
                "Book a flight from {origin} to {destination}[ with {seats} seats].",
                "I must fly from {origin} to {destination}[, {seats} people].",
            ],
        ),
        (
            "book_train",
            "Book a train",
            {
                "origin": ("str", "From", "city", None),
                "destination": ("str", "To", "city", None),
                "window": ("bool", "Window seat", "", False),
            },
            [
                "Book a train from {origin} to {destination}[ at the window{window:true}].",
                "Get me on a train from {origin} to {destination}[, window seat{window:true}|, no window seat"
                "{window:false}].",
            ],
        ),
        (
            "book_hotel",
            "Book a hotel",
            {
                "city": ("str", "City", "city", None),
                "nights": ("int", "Nights", "2-20", None),
                "breakfast": ("bool", "With breakfast", "", False),
            },
            [
                "Book a hotel in {city} for {nights} nights[ with breakfast{breakfast:true}| without breakfast"
                "{breakfast:false}].",
                "I want to sleep {nights} nights in {city}[ with breakfast{breakfast:true}].",
            ],
        ),
        (
            "rent_car",
            "Rent a car",
            {"city": ("str", "City", "city", None), "days": ("int", "Days", "2-30", None)},
            ["Rent a car in {city} for {days} days.", "I need a rental car for {days} days in {city}."],
        ),
        (
            "rent_bike",
            "Rent a bike",
            {"city": ("str", "City", "city", None), "hours": ("int", "Hours", "2-12", None)},
            ["Rent a bike in {city} for {hours} hours.", "I need a bike for {hours} hours in {city}."],
        ),
    ],
    [
        (
            "play_song",
            "Play a song",
            {"title": ("str", "Title", "song", None), "volume": ("int", "Volume", "5-95", 50)},
            ["Play {title}[ at volume {volume}].", "I want to hear {title}[ at volume {volume}]."],
        ),
        (
            "play_genre",
            "Play music of a genre",
            {"genre": ("str", "Genre", "genre", None), "minutes": ("int", "Minutes", "10-90", 30)},
            ["Play some {genre} music[ for {minutes} minutes].", "Put on {genre} music[ for {minutes} minutes]."],
        ),
        (
            "create_playlist",
            "Create a playlist",
            {"songs": ("List[str]", "Titles", "song*", None)},
            ["Make a playlist of {songs}.", "Create a playlist with {songs}."],
        ),
        (
            "set_volume",
            "Set the volume",
            {"level": ("int", "Level", "5-95", None)},
            ["Set the volume to {level}.", "Turn the sound to {level}."],
        ),
    ],
    [
        (
            "add_meeting",
            "Add a meeting",
            {
                "person": ("str", "With whom", "person", None),
                "hour": ("int", "Hour", "8-18", None),
                "topic": ("str", "Topic", "topic", "none"),
            },
            [
                "Set up a meeting with {person} at {hour}[ about {topic}].",
                "Let me meet {person} at {hour}[ about {topic}].",
            ],
        ),
        (
            "cancel_meeting",
            "Cancel a meeting",
            {"person": ("str", "With whom", "person", None), "notify": ("bool", "Tell them", "", True)},
            [
                "Cancel my meeting with {person}[ and say so{notify:true}| silently{notify:false}].",
                "Call off the meeting with {person}.",
            ],
        ),
        (
            "add_reminder",
            "Add a reminder",
            {"item": ("str", "Thing to buy", "item", None), "minutes": ("int", "In minutes", "5-95", None)},
            ["Remind me to buy {item} in {minutes} minutes.", "In {minutes} minutes remind me of the {item}."],
        ),
        (
            "set_alarm",
            "Set an alarm",
            {"hour": ("int", "Hour", "4-11", None), "minute": ("int", "Minute", "10-59", None)},
            ["Set an alarm for {hour}:{minute}.", "Wake me up at {hour}:{minute}."],
        ),
    ],
    [
        (
            "add_to_cart",
            "Put into the cart",
            {"item": ("str", "Item", "item", None), "quantity": ("int", "Quantity", "2-40", 1)},
            ["Add [{quantity} ]{item} to my cart.", "Put [{quantity} ]{item} in the cart."],
        ),
        (
            "remove_from_cart",
            "Take out of the cart",
            {"items": ("List[str]", "Items", "item*", None)},
            ["Remove {items} from my cart.", "Take {items} out of the cart."],
        ),
        (
            "compare_prices",
            "Compare prices",
            {"items": ("List[str]", "Items", "item*", None)},
            ["Compare the prices of {items}.", "Which is cheaper: {items}?"],
        ),
        (
            "find_store",
            "Find a store",
            {"item": ("str", "Item", "item", None), "city": ("str", "City", "city", None)},
            ["Where can I buy {item} in {city}?", "Find a store in {city} that sells {item}."],
        ),
    ],
    [
        (
            "convert_currency",
            "Convert money",
            {
                "amount": ("float", "Amount", "10.5-99.5", None),
                "source": ("str", "From", "currency", None),
                "target": ("str", "To", "currency", None),
            },
            ["Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?"],
        ),
        (
            "get_stock_price",
            "Price of a stock",
            {"symbol": ("str", "Symbol", "symbol", None), "currency": ("str", "Currency", "currency", "USD")},
            ["What does {symbol} cost[ in {currency}]?", "Price of {symbol}[ in {currency}]?"],
        ),
        (
            "buy_stock",
            "Buy shares",
            {"symbol": ("str", "Symbol", "symbol", None), "shares": ("int", "Shares", "2-95", None)},
            ["Buy {shares} shares of {symbol}.", "Purchase {shares} {symbol} shares."],
        ),
        (
            "sell_stock",
            "Sell shares",
            {"symbol": ("str", "Symbol", "symbol", None), "shares": ("int", "Shares", "2-95", None)},
            ["Sell {shares} shares of {symbol}.", "Get rid of {shares} {symbol} shares."],
        ),
    ],
    [
        (
            "send_email",
            "Send an email",
            {"recipient": ("str", "To whom", "person", None), "topic": ("str", "Subject", "topic", None)},
            ["Email {recipient} about {topic}.", "Write {recipient} an email on {topic}."],
        ),
        (
            "send_text",
            "Send a text message",
            {"recipient": ("str", "To whom", "person", None), "topic": ("str", "Subject", "topic", None)},
            ["Text {recipient} about {topic}.", "Send {recipient} a text on {topic}."],
        ),
        (
            "call_contact",
            "Call someone",
            {"recipient": ("str", "Whom", "person", None), "video": ("bool", "Video call", "", False)},
            [
                "Call {recipient}[ with video{video:true}| without video{video:false}].",
                "Phone {recipient}[ by video{video:true}].",
            ],
        ),
        (
            "create_group",
            "Create a group chat",
            {"members": ("List[str]", "Members", "person*", None)},
            ["Start a group chat with {members}.", "Create a group for {members}."],
        ),
    ],
    [
        (
            "light_on",
            "Turn a light on",
            {"room": ("str", "Room", "room", None), "percent": ("int", "Brightness", "10-90", 100)},
            ["Turn on the light in the {room}[ at {percent} percent].", "Light up the {room}[ at {percent} percent]."],
        ),
        (
            "light_off",
            "Turn lights off",
            {"rooms": ("List[str]", "Rooms", "room*", None)},
            ["Turn off the light in the {rooms}.", "Make the {rooms} dark."],
        ),
        (
            "set_thermostat",
            "Heat a room",
            {"room": ("str", "Room", "room", None), "degrees": ("float", "Degrees", "15.5-25.5", None)},
            ["Heat the {room} to {degrees} degrees.", "Set the {room} to {degrees} degrees."],
        ),
        (
            "clean_rooms",
            "Send the robot to clean",
            {"rooms": ("List[str]", "Rooms", "room*", None)},
            ["Clean the {rooms}.", "Vacuum the {rooms}."],
        ),
    ],
    [
        (
            "order_pizza",
            "Order pizza",
            {
                "topping": ("str", "Topping", "topping", None),
                "count": ("int", "How many", "2-9", 1),
                "size": ("str", "small, medium or large", "small|medium|large", "medium"),
            },
            ["Order [{count} ][{size} ]pizza with {topping}.", "Get [{count} ][{size} ]{topping} pizza."],
        ),
        (
            "find_recipe",
            "Find a recipe",
            {"dish": ("str", "Dish", "dish", None), "servings": ("int", "Servings", "3-12", 2)},
            ["Find a recipe for {dish}[ for {servings} people].", "How do I cook {dish}[ for {servings} people]?"],
        ),
        (
            "get_calories",
            "Calories of a food",
            {"food": ("str", "Food", "dish", None), "grams": ("int", "Grams", "50-950", None)},
            ["How many calories are in {grams} grams of {food}?", "Calories of {grams} grams {food}?"],
        ),
        (
            "book_table",
            "Book a table",
            {
                "city": ("str", "City", "city", None),
                "guests": ("int", "Guests", "2-12", None),
                "hour": ("int", "Hour", "17-22", 19),
            },
            ["Book a table for {guests} in {city}[ at {hour}].", "Reserve dinner in {city} for {guests}[ at {hour}]."],
        ),
    ],
    [
        (
            "compute_area",
            "Area of a rectangle",
            {"width": ("float", "Width", "1.5-99.5", None), "height": ("float", "Height", "1.5-99.5", None)},
            ["Compute the area of {width} by {height}.", "What is the area of a {width} by {height} field?"],
        ),
        (
            "convert_length",
            "Convert a length",
            {
                "meters": ("float", "Meters", "1.5-99.5", None),
                "unit": ("str", "feet, miles or yards", "feet|miles|yards", None),
            },
            ["Convert {meters} meters to {unit}.", "How many {unit} are {meters} meters?"],
        ),
        (
            "roll_dice",
            "Roll dice",
            {"sides": ("int", "Sides", "4-20", 6), "times": ("int", "Times", "2-9", None)},
            ["Roll a die [with {sides} sides ]{times} times.", "Throw {times} dice[ of {sides} sides]."],
        ),
        (
            "add_numbers",
            "Add two numbers",
            {"a": ("int", "First", "10-950", None), "b": ("int", "Second", "10-950", None)},
            ["What is {a} plus {b}?", "Add {a} and {b}."],
        ),
    ],
    [
        (
            "log_run",
            "Log a run",
            {"kilometers": ("float", "Distance", "1.5-40.5", None), "minutes": ("int", "Time", "10-95", 0)},
            [
                "I ran {kilometers} kilometers[ in {minutes} minutes].",
                "Log a run of {kilometers} kilometers[ in {minutes} minutes].",
            ],
        ),
        (
            "start_workout",
            "Start a workout",
            {"activity": ("str", "Activity", "activity", None), "minutes": ("int", "Minutes", "10-90", 30)},
            ["Start {activity}[ for {minutes} minutes].", "Begin a [{minutes} minute ]{activity} workout."],
        ),
        (
            "log_sleep",
            "Log sleep",
            {"hours": ("float", "Hours", "4.5-10.5", None)},
            ["I slept {hours} hours.", "Log {hours} hours of sleep."],
        ),
        (
            "log_weight",
            "Log weight",
            {"kilograms": ("float", "Weight", "45.5-99.5", None)},
            ["I weigh {kilograms} kilograms.", "Log my weight: {kilograms} kilograms."],
        ),
    ],
    [
        (
            "book_cinema",
            "Book cinema tickets",
            {"movie": ("str", "Movie", "movie", None), "tickets": ("int", "Tickets", "2-9", 1)},
            ["Book [{tickets} ]tickets for {movie}.", "Get [{tickets} ]seats to see {movie}."],
        ),
        (
            "rate_movie",
            "Rate a movie",
            {"movie": ("str", "Movie", "movie", None), "stars": ("int", "Stars", "1-10", None)},
            ["Rate {movie} with {stars} stars.", "Give {movie} {stars} stars."],
        ),
        (
            "find_book",
            "Find books",
            {"author": ("str", "Author", "author", None), "limit": ("int", "How many", "3-30", 10)},
            ["Find books by {author}[, at most {limit}].", "What did {author} write?[ Show {limit}.]"],
        ),
        (
            "translate",
            "Translate words",
            {"words": ("List[str]", "Words", "word*", None), "language": ("str", "To", "language", None)},
            ["Translate {words} to {language}.", "What are {words} in {language}?"],
        ),
    ],
]
TOOLS = [tool for family in FAMILIES for tool in family]
