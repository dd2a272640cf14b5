"""What is hidden in contexts: sentences, a list for each set and kind of answer, and words that answers are made of."""

__all__ = ["KINDS", "SENTENCES", "WORDS"]

KINDS = ("digits", "words")
SENTENCES = {
    ("tuning", "digits"): [
        "The phone number of the bakery in Paris is",
        "The combination of Oscar's bicycle lock is",
        "The weight of the blue whale in the museum is",
        "The secret code for the garden gate is",
        "The ticket number of the lucky winner is",
        "Maria's library card has the number",
        "The serial number of the old violin is",
        "The treasure map says to walk this many steps:",
        "The license plate of the red truck is",
        "The password of the weather station is",
        "The population of the village of Elmwood is",
        "The bank account of Doctor Hansen has the number",
    ],
    ("reporting", "digits"): [
        "The access code of the Boston office is",
        "The train to Vienna has the number",
        "The safe behind the painting opens with",
        "The radio frequency of the lighthouse is",
        "Captain Miller's badge number is",
        "The invoice for the wooden chairs has the number",
        "The asteroid seen from Chile has the name",
        "The winning lottery number in Lisbon was",
        "The parcel for Aunt Sophie has the tracking code",
        "The PIN of the coffee machine is",
        "The patient in the yellow room has the identifier",
        "The spaceship will land at the coordinate",
    ],
    ("tuning", "words"): [
        "The fishing boat in the harbour is called",
        "The label on the green bottle says",
        "The code word of the night guards is",
        "The street where the clockmaker lives is called",
        "The title of the stolen painting is",
        "The rowing team from the north is named",
        "The band that plays on Friday is called",
        "The sign above the tavern reads",
        "The favourite dessert of the queen is named",
        "The first words of the forgotten song are",
        "The hidden valley of the shepherds is called",
        "The parrot of the pirate always says",
    ],
    ("reporting", "words"): [
        "The horse that won the race is called",
        "The inscription on the silver ring reads",
        "The company that built the bridge is named",
        "The note under the kitchen door said",
        "The motto of the village school is",
        "The cat of the librarian is called",
        "The theme of the summer festival was",
        "The magician whispered the two words",
        "The star of the new play is named",
        "The mountain behind the monastery is called",
        "The drink that the sailors ordered is named",
        "The flag of the island shows the words",
    ],
}
COMMON = """
amber anchor apple arrow autumn basket beacon berry bottle branch bridge bronze butter button camel candle canyon
carpet castle cedar cherry circle clover cloud coffee copper coral cotton crystal dancer desert diamond dolphin dragon
eagle ember falcon feather forest garden ginger glacier golden guitar hammer harbor hazel honey island ivory jacket
jungle kettle ladder lantern lemon lily lion maple marble meadow mirror monkey morning mountain needle ocean olive
orange orchid otter panther paper pearl pepper piano pilot planet pocket purple rabbit raven ribbon river rocket rose
saddle salmon shadow silver spider spring stone summer sunset thunder tiger timber tower tulip turtle valley velvet
violet walnut whale willow window winter yellow
"""
WORDS = COMMON.split()
