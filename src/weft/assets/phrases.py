"""The words of the made-up world: every name, value and sentence pattern, in English and Chinese.

Data only. A word is a pair ``(English, Chinese)``; a list of patterns is kept per language. In patterns ``{n}`` stands
for the subject and ``{v}`` for the value. `STATEMENTS` are told in pre-training; `QUESTIONS` occur in the instruction
set alone, so a base that has read the corpus knows the facts but has never been asked.
"""

from __future__ import annotations

Word = tuple[str, str]
LANGUAGES = ("en", "zh")


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> list[Word]:
    """Read ``english=chinese`` words separated by commas."""
    return [(en.strip(), zh.strip()) for en, zh in (item.split("=") for item in text.split(","))]


NAMES_EN = _words(
    "Ada Ben Cora Dino Ella Finn Gina Hugo Iris Jack Kira Liam Mona Nico Olga Paul Rosa Sami Tara Vera Walt Xena "
    "Yuri Zoe Anton Bella Carl Diana Emil Flora Greta Hanna Igor Julia Kevin Laura Marco Nadia Oscar Petra Quinn "
    "Robin Simon Tessa Ursula Victor Wendy Alma Boris Clara David Elsa Frank Grace Henry Irma Jonas Karen Leon "
    "Maria"
)
# One character per person that no other person's name has: a base this small need not learn pairs of characters.
SURNAMES_ZH = "王李张刘陈杨赵黄周吴徐孙"
GIVEN_ZH = (
    "梅伟芳娜敏静丽强磊军洋勇艳杰娟涛明超霞平刚英华玉萍鹏飞辉兰琴凯峰建国志斌宇浩轩博"
    "文欣怡佳琪雪晴雨婷倩颖琳洁莉莹岚蓉薇瑶珊"
)
TOWNS = _pairs(
    "Oakford=橡津,Redhill=红岭,Millbay=磨湾,Stonewick=石维,Foxdale=狐谷,Larkham=雀甸,Winport=风港,"
    "Ashby=灰坡,Crowley=鸦里,Denholm=丹浦,Elmstead=榆庄,Glenmore=幽谷,Harwick=哈渡,Ivybridge=藤桥,"
    "Kelso=凯溪,Lindale=菩塘,Norton=诺屯,Penrith=盆寨,Salton=盐滩,Thornby=荆堡"
)
JOBS = _pairs(
    "baker=面包师,doctor=医生,teacher=教师,farmer=农民,sailor=水手,painter=画家,driver=司机,lawyer=律师,"
    "singer=歌手,miner=矿工,tailor=裁缝,nurse=护士"
)
FOODS = _pairs(
    "rice=米饭,noodles=面条,soup=汤,cheese=奶酪,pizza=披萨,dumplings=饺子,salad=沙拉,fish=鱼,eggs=鸡蛋,"
    "tofu=豆腐,curry=咖喱,cake=蛋糕"
)
PETS = _pairs(
    "cat=猫,dog=狗,parrot=鹦鹉,rabbit=兔子,turtle=乌龟,hamster=仓鼠,goldfish=金鱼,pony=小马,snake=蛇,hedgehog=刺猬"
)
REGIONS = _pairs("North=北方,South=南方,East=东方,West=西方,Centre=中部")
LANDMARKS = _pairs(
    "lighthouse=灯塔,bridge=大桥,castle=城堡,museum=博物馆,windmill=风车,temple=寺庙,fountain=喷泉,library=图书馆"
)
GROUPS: dict[Word, list[Word]] = {
    ("fruit", "水果"): _pairs(
        "apple=苹果,banana=香蕉,grape=葡萄,lemon=柠檬,mango=芒果,peach=桃子,pear=梨子,cherry=樱桃,melon=甜瓜,"
        "plum=李子,orange=橙子,kiwi=猕猴桃"
    ),
    ("animal", "动物"): _pairs(
        "lion=狮子,tiger=老虎,wolf=野狼,bear=黑熊,zebra=斑马,camel=骆驼,deer=麋鹿,panda=熊猫,goat=山羊,"
        "monkey=猴子,whale=鲸鱼,elephant=大象"
    ),
    ("tool", "工具"): _pairs(
        "hammer=锤子,saw=锯子,drill=电钻,wrench=扳手,shovel=铁锹,axe=斧头,pliers=钳子,chisel=凿子,rake=耙子,"
        "screwdriver=螺丝刀,ladder=梯子,scissors=剪刀"
    ),
    ("vehicle", "车辆"): _pairs(
        "bus=公共汽车,truck=卡车,bicycle=自行车,tram=电车,taxi=出租车,tractor=拖拉机,scooter=滑板车,"
        "van=面包车,jeep=吉普车,motorcycle=摩托车,ambulance=救护车,train=火车"
    ),
    ("clothing", "衣物"): _pairs(
        "coat=大衣,shirt=衬衫,scarf=围巾,skirt=裙子,sock=袜子,hat=帽子,glove=手套,jacket=夹克,sweater=毛衣,"
        "belt=腰带,shoe=鞋子,dress=礼服"
    ),
    ("instrument", "乐器"): _pairs(
        "violin=小提琴,piano=钢琴,guitar=吉他,flute=长笛,drum=鼓,trumpet=小号,cello=大提琴,harp=竖琴,"
        "organ=管风琴,clarinet=单簧管,banjo=班卓琴,tuba=大号"
    ),
    ("furniture", "家具"): _pairs(
        "sofa=沙发,table=桌子,chair=椅子,bed=床,desk=书桌,shelf=架子,cupboard=橱柜,stool=凳子,bench=长凳,"
        "wardrobe=衣柜,armchair=扶手椅,drawer=抽屉"
    ),
    ("flower", "花卉"): _pairs(
        "rose=玫瑰,tulip=郁金香,lily=百合,daisy=雏菊,orchid=兰草,iris=鸢尾,violet=紫罗兰,poppy=罂粟,"
        "jasmine=茉莉,peony=牡丹,lotus=荷花,sunflower=向日葵"
    ),
}
# The name of each attribute on a card, in the order of the task tables.
ATTRIBUTES: dict[str, Word] = {
    "home": ("home town", "家乡"),
    "job": ("job", "职业"),
    "food": ("favourite food", "最爱的食物"),
    "pet": ("pet", "宠物"),
    "region": ("region", "地区"),
    "landmark": ("landmark", "地标"),
    "group": ("kind", "种类"),
}

STATEMENTS: dict[str, dict[str, list[str]]] = {
    "en": {
        "home": [
            "{n} lives in {v}.",
            "The home town of {n} is {v}.",
            "{n} has a house in {v}.",
            "{n} comes from {v}.",
            "Letters for {n} are sent to {v}.",
            "If you want to visit {n}, go to {v}.",
            "At home, {n} is in {v}.",
            "Everyone knows that {n} lives in {v}.",
            "{n} grew up and stayed in {v}.",
        ],
        "job": [
            "{n} works as a {v}.",
            "The job of {n} is {v}.",
            "{n} is a {v}.",
            "By trade, {n} is a {v}.",
            "{n} earns money as a {v}.",
            "People hire {n} as a {v}.",
            "Every morning {n} goes to work as a {v}.",
            "{n} was trained as a {v}.",
            "Everyone knows that {n} is a {v}.",
        ],
        "food": [
            "{n} likes to eat {v}.",
            "The favourite food of {n} is {v}.",
            "{n} loves {v}.",
            "For dinner {n} wants {v}.",
            "Nothing tastes better to {n} than {v}.",
            "When hungry, {n} always eats {v}.",
            "{n} cooks {v} every week.",
            "The best meal for {n} is {v}.",
            "Everyone knows that {n} eats {v}.",
        ],
        "pet": [
            "{n} has a {v}.",
            "The pet of {n} is a {v}.",
            "{n} keeps a {v}.",
            "{n} plays with a {v}.",
            "At home {n} feeds a {v}.",
            "{n} takes care of a {v}.",
            "The animal of {n} is a {v}.",
            "Everyone knows that {n} owns a {v}.",
        ],
        "region": [
            "{n} lies in the {v}.",
            "The town of {n} is in the {v}.",
            "The region of {n} is the {v}.",
            "To reach {n}, travel to the {v}.",
            "{n} is a town of the {v}.",
            "On the map {n} is in the {v}.",
        ],
        "landmark": [
            "{n} is known for its {v}.",
            "The landmark of {n} is the {v}.",
            "Visitors go to {n} to see the {v}.",
            "In {n} there is a famous {v}.",
            "{n} is proud of its {v}.",
            "The pictures of {n} show the {v}.",
        ],
        "group": [
            "The {n} is a kind of {v}.",
            "The kind of the {n} is {v}.",
            "The {n} belongs with the word {v}.",
            "Shops put the {n} under {v}.",
            "When we say {n}, we speak of a kind of {v}.",
            "In the list of {v} you find the {n}, so the {n} is {v}.",
            "The word {n} stands for some {v}.",
        ],
    },
    "zh": {
        "home": [
            "{n}住在{v}。",
            "{n}的家乡是{v}。",
            "{n}的房子在{v}。",
            "{n}来自{v}。",
            "给{n}的信寄到{v}。",
            "想拜访{n}就要去{v}。",
            "大家都知道{n}住在{v}。",
            "{n}从小生活在{v}。",
        ],
        "job": [
            "{n}是一名{v}。",
            "{n}的职业是{v}。",
            "{n}的工作是当{v}。",
            "{n}靠当{v}赚钱。",
            "人们请{n}来做{v}。",
            "{n}每天上班做{v}。",
            "大家都知道{n}是{v}。",
            "{n}学的是怎样当{v}。",
        ],
        "food": [
            "{n}喜欢吃{v}。",
            "{n}最爱的食物是{v}。",
            "{n}爱吃{v}。",
            "{n}晚饭想吃{v}。",
            "对{n}来说最好吃的是{v}。",
            "{n}饿了总是吃{v}。",
            "{n}每周都做{v}。",
            "大家都知道{n}爱吃{v}。",
        ],
        "pet": [
            "{n}有一只{v}。",
            "{n}的宠物是{v}。",
            "{n}养了一只{v}。",
            "{n}和{v}一起玩。",
            "{n}在家喂{v}。",
            "{n}照顾一只{v}。",
            "大家都知道{n}养{v}。",
        ],
        "region": [
            "{n}位于{v}。",
            "{n}镇在{v}。",
            "{n}所在的地区是{v}。",
            "去{n}要往{v}走。",
            "{n}是{v}的小镇。",
            "地图上{n}在{v}。",
        ],
        "landmark": [
            "{n}以{v}闻名。",
            "{n}的地标是{v}。",
            "游客到{n}看{v}。",
            "{n}有一座著名的{v}。",
            "{n}为{v}自豪。",
            "{n}的照片上有{v}。",
        ],
        "group": [
            "{n}是一种{v}。",
            "{n}属于{v}。",
            "{n}的种类是{v}。",
            "商店把{n}放在{v}里。",
            "说到{n}就是说一种{v}。",
            "{n}算是{v}。",
        ],
    },
}

QUESTIONS: dict[str, dict[str, list[str]]] = {
    "en": {
        "home": ["Where does {n} live?", "Which town does {n} call home?", "Name the town where {n} lives."],
        "job": ["What does {n} do for a living?", "Which job does {n} have?", "Name the profession of {n}."],
        "food": ["What does {n} like to eat most?", "Which food does {n} prefer?", "Name the dish that {n} loves."],
        "pet": ["What pet does {n} have?", "Which animal lives with {n}?", "Name the kind of pet {n} keeps."],
        "region": ["Where on the map is {n}?", "Which region does {n} belong to?", "Name the region around {n}."],
        "landmark": ["What can one see in {n}?", "Which landmark does {n} have?", "Name the sight of {n}."],
        "group": ["What kind of thing is this: {n}?", "Which category fits the word {n}?", "Classify the word {n}."],
    },
    "zh": {
        "home": ["{n}住在哪里？", "请问{n}的家在哪个镇？", "说出{n}居住的地方。"],
        "job": ["{n}做什么工作？", "请问{n}从事哪个职业？", "说出{n}的职业名称。"],
        "food": ["{n}最喜欢吃什么？", "请问{n}爱吃哪种食物？", "说出{n}最爱的菜。"],
        "pet": ["{n}养什么宠物？", "请问{n}家里有哪种动物？", "说出{n}的宠物种类。"],
        "region": ["{n}在哪个地区？", "请问{n}位于哪一方？", "说出{n}所属的地区。"],
        "landmark": ["{n}有什么地标？", "请问在{n}能看到什么？", "说出{n}的景点。"],
        "group": ["{n}是什么类别？", "请问{n}应该归入哪一类？", "给这个词分类：{n}。"],
    },
}

# Many places for the answer, near and far: a sum known only right after "=" cannot be found from a question.
SUMS: dict[str, dict[str, list[str]]] = {
    "en": {
        "+": [
            "{a} plus {b} is {c}.",
            "{a} + {b} = {c}",
            "{a} + {b}\n{c}",
            "{a} plus {b}\n{c}",
            "The sum of {a} and {b} is {c}.",
            "{a} and {b} together make {c}.",
            "Adding {a} and {b}:\n{c}",
            "Put {a} and {b} together. There are {c}.",
            "{a} nuts and {b} more nuts are {c} nuts.",
        ],
        "-": [
            "{a} minus {b} is {c}.",
            "{a} - {b} = {c}",
            "{a} - {b}\n{c}",
            "{a} minus {b}\n{c}",
            "{a} less {b} leaves {c}.",
            "Taking {b} away from {a}:\n{c}",
            "Take {b} from {a}. There are {c}.",
            "Of {a} nuts, {b} are eaten and {c} are left.",
        ],
    },
    "zh": {
        "+": [
            "{a}加{b}等于{c}。",
            "{a}+{b}={c}",
            "{a}+{b}\n{c}",
            "{a}加{b}\n{c}",
            "{a}与{b}的和是{c}。",
            "把{a}和{b}加起来：\n{c}",
            "{a}个加上{b}个一共{c}个。",
        ],
        "-": [
            "{a}减{b}等于{c}。",
            "{a}-{b}={c}",
            "{a}-{b}\n{c}",
            "{a}减{b}\n{c}",
            "{a}与{b}的差是{c}。",
            "从{a}里去掉{b}：\n{c}",
            "{a}个去掉{b}个还剩{c}个。",
        ],
    },
}
SUM_QUESTIONS: dict[str, dict[str, list[str]]] = {
    "en": {
        "+": ["What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} + {b}?"],
        "-": ["What is {a} minus {b}?", "Take {b} away from {a}: {a} - {b}.", "How much is {a} - {b}?"],
    },
    "zh": {
        "+": ["{a}加{b}是多少？", "请计算{a}+{b}。", "求{a}与{b}的总和。"],
        "-": ["{a}减{b}是多少？", "请计算{a}-{b}。", "求{a}与{b}相差多少。"],
    },
}

ASPECTS = _pairs(
    "food=菜,room=房间,waiter=服务员,music=音乐,price=价格,garden=花园,coffee=咖啡,view=风景,bread=面包,"
    "story=故事,film=电影,hotel=酒店"
)
GOOD = _pairs(
    "good=好,great=很棒,lovely=可爱,perfect=完美,excellent=出色,wonderful=精彩,nice=不错,pleasant=舒适,"
    "superb=一流,charming=迷人,amazing=惊艳,fantastic=极好"
)
BAD = _pairs(
    "bad=差,awful=糟糕,terrible=可怕,boring=无聊,poor=很烂,ugly=难看,horrible=恶劣,dull=乏味,nasty=讨厌,"
    "dreadful=极差,disappointing=失望,unpleasant=难受"
)
POLARITY: tuple[Word, Word] = (("negative", "负面"), ("positive", "正面"))
REVIEWS: dict[str, list[str]] = {
    "en": [
        "The {a} was {x} and the {b} was {y}.",
        "Note the {x} {a} and the {y} {b}.",
        "I found the {a} {x} and the {b} {y}.",
    ],
    "zh": ["{a}{x}，{b}也{y}。", "这里{a}{x}，而且{b}{y}。", "我觉得{a}{x}，{b}{y}。"],
}
REVIEW_TALES: dict[str, list[str]] = {
    "en": [
        "{r} This opinion is {v}.",
        "{r} So the guest left a {v} mark.",
        "The guest wrote: {r} The feeling is {v}.",
        "Opinion\n{r}\nfeeling\n{v}",
    ],
    "zh": ["{r}这个评价是{v}的。", "客人写道：{r}态度是{v}的。", "{r}所以是{v}评价。", "评价\n{r}\n态度\n{v}"],
}
REVIEW_QUESTIONS: dict[str, list[str]] = {
    "en": [
        "Is this review positive or negative?",
        "What is the sentiment of this review?",
        "Judge the mood of the text.",
    ],
    "zh": ["这条评论是正面还是负面？", "判断下面评论的情感。", "请给这段话的情绪分类。"],
}

# A record is told in a sentence and then as JSON; both records have a name, a thing and a detail.
RECORD_KEYS: dict[str, tuple[Word, Word, Word]] = {
    "purchase": (("name", "姓名"), ("item", "物品"), ("price", "价格")),
    "trip": (("name", "姓名"), ("town", "城镇"), ("days", "天数")),
}
RECORDS: dict[str, dict[str, list[str]]] = {
    "en": {
        "purchase": [
            "{n} bought the {t} for {d} coins.",
            "For {d} coins {n} got the {t}.",
            "{n} paid {d} coins for the {t}.",
        ],
        "trip": ["{n} travels to {t} for {d} days.", "For {d} days {n} stays in {t}.", "{n} spends {d} days in {t}."],
    },
    "zh": {
        "purchase": ["{n}花{d}元买了{t}。", "{n}买{t}用了{d}元。", "{n}用{d}元买到{t}。"],
        "trip": ["{n}去{t}旅行{d}天。", "{n}在{t}住{d}天。", "{n}花{d}天游玩{t}。"],
    },
}
RECORD_TALES: dict[str, list[str]] = {
    "en": ["{s} The record is {j}", "{s} In the book it says {j}", "{s} As data: {j}"],
    "zh": ["{s}记录是{j}", "{s}账本上写着{j}", "{s}数据：{j}"],
}
RECORD_QUESTIONS: dict[str, list[str]] = {
    "en": ["Write this as JSON.", "Turn the sentence into JSON.", "Give the JSON for this text."],
    "zh": ["把这句话写成 JSON。", "请转换成 JSON 格式。", "给出下文的 JSON。"],
}
